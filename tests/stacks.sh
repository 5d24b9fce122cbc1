#!/usr/bin/env bash
# Runs what a release may break on the other two stacks that are supported:
# the newest JAX, and what Colab has preinstalled. A stack whose Python is not
# on this machine is left out, and that is said.
set -euo pipefail
cd "$(dirname "$0")/.."

find_python() { # 3.12: one on the path that runs, else one of pyenv's
  if "python$1" -c '' 2>/dev/null; then
    command -v "python$1"
  elif command -v pyenv >/dev/null; then
    local version
    version=$(pyenv versions --bare | grep -E "^${1//./\\.}\.[0-9]+$" | tail -n 1)
    if [ -n "$version" ]; then
      echo "$(pyenv prefix "$version")/bin/python"
    fi
  fi
}

stack() { # name, of its constraints too; Python version
  local name=$1 python
  python=$(find_python "$2" || true)
  if [ -z "$python" ]; then
    echo "stack $name: no Python $2 here, left out"
    return
  fi
  local venv=.venv-$name pins=constraints/$name.txt
  "$python" -m venv "$venv"
  "$venv/bin/python" -m pip install -q --upgrade pip -c "$pins"
  "$venv/bin/python" -m pip install -q -c "$pins" --build-constraint "$pins" \
    -e '.[test]'
  echo "stack $name: $("$venv/bin/python" -c 'import flax, jax; print("jax", jax.__version__, "flax", flax.__version__)')"
  "$venv/bin/python" -m pytest -q -m 'not slow and not campaign' \
    tests/sae tests/lm/test_golden.py tests/test_restore.py \
    tests/test_notebooks.py \
    tests/launch/test_preflight.py::test_products_of_all_devices \
    tests/training/test_groups.py::test_a_stacked_member_is_the_member_alone \
    tests/training/test_groups.py::test_features_over_devices_send_two_reconstructions_and_no_weights \
    tests/training/test_groups.py::test_saes_over_devices_send_nothing \
    tests/training/test_sparse.py::test_a_step_is_the_dense_one \
    tests/training/test_step.py::test_losses_are_those_of_one_device_on_every_mesh \
    tests/training/test_step.py::test_trajectory_equals_the_float64_reference \
    tests/training/test_checkpoints.py::test_resumed_equals_uninterrupted_to_the_bit \
    tests/training/test_checkpoints.py::test_a_run_moved_between_meshes_is_the_one_that_stayed \
    tests/test_processes.py::test_two_processes_write_the_store_of_one \
    tests/test_processes.py::test_two_processes_evaluate_as_one \
    tests/test_programs.py::test_the_four_commands_leave_what_the_contract_says
}

stack newest "${PYTHON_NEWEST:-3.12}"
stack colab "${PYTHON_COLAB:-3.13}"
