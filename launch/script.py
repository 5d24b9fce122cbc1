"""The start-up script of a host: settings, and startup.sh below them."""

import pathlib
from collections.abc import Mapping
from urllib.parse import quote

from gsae_jax import paths
from launch.submission import Submission

_BODY = pathlib.Path(__file__).with_name('startup.sh')


def startup_script(
  submission: Submission,
  role: str,
  *,
  apart: bool,
  date: str,
  environment: Mapping[str, str],
  queued_resource: str | None = None,
) -> str:
  """What a host runs.

  Args:
    submission: the run.
    role: 'trainer' or 'evaluator'.
    apart: whether evaluation is another role's.
    date: packages are those of that day, as ISO 8601.
    environment: variables for the worker.
    queued_resource: its full name, to be deleted when all is over.
  """
  bucket, _, name = paths.split(str(submission.run))[1].partition('/')
  # On one host too, so that a run goes on where there are more.
  worker = submission.worker_arguments(
    role,
    ['--coordinator=auto'],
    apart=apart,
    notices=True,
    queued_resource=queued_resource,
  )
  extras = ['tpu', 'gcs', 'datasets']
  if 'wandb' in submission.config['train']['writers']:
    extras.append('wandb')
  code = submission.code.id
  settings = {
    'GSAE_BUCKET': bucket,
    'GSAE_OBJECT': quote(f'{name}/code/{code}.tar.gz', safe=''),
    'GSAE_LOGS': quote(f'{name}/logs/startup', safe=''),
    'GSAE_STATE': quote(f'{name}/state/{role}.json', safe=''),
    'GSAE_ID': code,
    'GSAE_DATE': date,
    'GSAE_EXTRAS': ','.join(extras),
  }
  lines = ['#!/usr/bin/env bash']
  lines += [f'export {k}={_quoted(v)}' for k, v in environment.items()]
  lines += [f'{k}={_quoted(v)}' for k, v in settings.items()]
  quoted = ''.join(f'  {_quoted(a)}\n' for a in worker)
  lines.append(f'GSAE_WORKER=(\n{quoted})')
  return '\n'.join(lines) + '\n\n' + _BODY.read_text()


def _quoted(value: str) -> str:
  """In quotes even where none are needed: commas look like a mistake."""
  return "'" + value.replace("'", """'"'"'""") + "'"
