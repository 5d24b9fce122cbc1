"""What a run would take of TPUs, said by their own compiler, without one."""
