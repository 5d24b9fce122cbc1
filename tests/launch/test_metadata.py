"""What is made of the metadata server's answers."""

import threading

from launch import metadata


def test_a_watch_tells_each_answer_once_until_it_is_withdrawn():
  answers, told = ['a', 'a', None, 'a', 'b', 'b'], []
  all_asked = threading.Event()

  def ask():
    if len(answers) == 1:
      all_asked.set()
      return answers[0]
    return answers.pop(0)

  watch = metadata.Watch(ask, told.append, 0.001)
  watch.start()
  assert all_asked.wait(20)
  watch.stop()
  assert told == ['a', 'a', 'b']
