"""Manifests as YAML, and what kubectl does with them."""

import subprocess

import yaml

from gsae_jax.errors import UserError
from launch.patience import Unreachable

# What is refused today is refused tomorrow.
_REFUSED = '(Forbidden)', '(Unauthorized)', "doesn't have a resource type"


class _Dumper(yaml.SafeDumper):
  """Scripts as they are, line by line."""


_Dumper.add_representer(
  str,
  lambda dumper, text: dumper.represent_scalar(
    'tag:yaml.org,2002:str', text, style='|' if '\n' in text else None
  ),
)


def to_yaml(manifests: list[dict]) -> str:
  """Documents of one file."""
  return yaml.dump_all(manifests, Dumper=_Dumper, sort_keys=False)


def run(launch: dict, *arguments: str, text: str | None = None) -> str:
  """What kubectl prints.

  Raises:
    UserError: it is not installed, or it refuses.
  """
  command = ['kubectl', f'--namespace={launch["namespace"]}']
  if launch['context']:
    command.append(f'--context={launch["context"]}')
  try:
    return subprocess.run(
      [*command, *arguments],
      input=text,
      check=True,
      capture_output=True,
      text=True,
    ).stdout
  except FileNotFoundError as e:
    raise UserError(
      'kubectl is not installed; gcloud components install kubectl'
    ) from e
  except subprocess.CalledProcessError as e:
    lines = e.stderr.strip().splitlines() or [f'it ended with {e.returncode}']
    kind = UserError if any(r in lines[-1] for r in _REFUSED) else Unreachable
    raise kind(
      f'kubectl {arguments[0]}: {lines[-1]}; see that gcloud container clusters '
      'get-credentials was run, and that the cluster has JobSet'
    ) from e
