"""`python -m launch gke`: the machines of a run as JobSets, through kubectl."""

import json
import sys

from absl import flags
from etils import epath

from gsae_jax.errors import UserError
from launch import door, identity, jobset, kubectl, specs, view
from launch.patience import Patience
from launch.script import startup_script
from launch.submission import asked_before, check_hosts, date_of_packages


def define_flags(values: flags.FlagValues, verb: str) -> None:
  """Adds the flags of a verb."""
  door.define_run(values)
  if verb == 'submit':
    door.define_submission(values)
    door.define_machines(values)
    flags.DEFINE_bool(
      'spot', False, 'Cheaper, and taken away at any time.', flag_values=values
    )
    flags.DEFINE_string(
      'context',
      None,
      "Of kubectl, if not its present one's.",
      flag_values=values,
    )
    flags.DEFINE_string(
      'namespace', 'default', 'Of the JobSet.', flag_values=values
    )
    flags.DEFINE_string(
      'queue', None, "Kueue's LocalQueue, if there is one.", flag_values=values
    )
    flags.DEFINE_string(
      'image',
      'python:3.12',
      'With bash, curl and tar in it.',
      flag_values=values,
    )
    flags.DEFINE_string(
      'service_account',
      None,
      'Of Kubernetes, which may use the bucket.',
      flag_values=values,
    )
  door.define_following(values, verb, 30.0)


def _spec(
  given: flags.FlagValues, topology: str, flag: str, slices: int
) -> jobset.JobSpec:
  specs.check_slices(slices)
  return jobset.JobSpec(
    slice=specs.parse_slice(topology, flag),
    slices=slices,
    spot=given.spot,
    namespace=given.namespace,
    queue=given.queue,
    image=given.image,
    service_account=given.service_account,
  )


def submit(given: flags.FlagValues) -> None:
  roles = {'trainer': _spec(given, given.topology, '--topology', given.slices)}
  if given.evaluator:
    roles['evaluator'] = _spec(given, given.evaluator, '--evaluator', 1)
  environment = door.read_environment(given)
  chips = roles['trainer'].slice.chips * given.slices
  run = door.read_submission(given, chips=chips, remote=True)
  check_hosts(run.store is None, roles['trainer'].slice.hosts * given.slices)
  dry = given.dry_run
  date = identity.now() if dry else date_of_packages(run.run)
  manifests = []
  for role, spec in roles.items():
    script = startup_script(
      run,
      role,
      apart='evaluator' in roles,
      date=date,
      environment=environment,
    )
    manifests.append(jobset.manifest(spec, run.name_of(role), script))
  text = kubectl.to_yaml(manifests)
  if dry:
    print(text)
    return
  launch = {
    'date': date,
    'context': given.context,
    'namespace': given.namespace,
    'jobsets': [m['metadata']['name'] for m in manifests],
  }
  # It may have been elsewhere, with another cluster or namespace.
  for asked in (asked_before(run.run, 'gke'), launch):
    if asked:
      _make_room(run.run, asked)
  run.record('gke', tuple(roles), launch)
  print(kubectl.run(launch, 'apply', '-f', '-', text=text), end='')


def _make_room(run: epath.Path, launch: dict) -> None:
  """Deletes the JobSets of a run that is over.

  Raises:
    UserError: they are there, and it is not.
  """
  names = _named(launch, 'get')
  found = kubectl.run(launch, *names, '--ignore-not-found', '-oname')
  if not found:
    return
  if not all(view.is_over(run, role) for role in _roles(launch)):
    raise UserError(
      f'--run: {found.split()[0]} is there; watch it, or delete it first'
    )
  kubectl.run(launch, *_named(launch, 'delete'), '--ignore-not-found')


def _named(launch: dict, verb: str) -> list[str]:
  return [verb, 'jobset', *launch['jobsets']]


def _roles(launch: dict) -> tuple[str, ...]:
  return identity.ROLES[: len(launch['jobsets'])]


def status(given: flags.FlagValues) -> None:
  run, launch = door.read_launch(given, 'gke', remote=True)
  print(
    kubectl.run(launch, *_named(launch, 'get'), '--ignore-not-found'), end=''
  )
  view.show_state(run)


def watch(given: flags.FlagValues) -> None:
  """JobSet starts again what was preempted; this only looks."""
  run, launch = door.read_launch(given, 'gke', remote=True)
  pause = door.make_pause(given.poll_seconds)
  patience, shown = Patience(), set()
  while True:
    with patience.bear():
      if all(view.is_over(run, role) for role in _roles(launch)):
        view.conclude(run)
        return
      for line in _conditions(launch):
        if line not in shown:
          print(line, flush=True)
          shown.add(line)
        if ' Failed: ' in line:
          raise UserError(f'{line}; `launch gke logs` and kubectl may say why')
    pause()


def _conditions(launch: dict) -> list[str]:
  """What the cluster says of each JobSet."""
  found = json.loads(
    kubectl.run(launch, *_named(launch, 'get'), '--ignore-not-found', '-ojson')
    or '{}'
  )
  items = found.get('items', [found] if found else [])
  return [
    f'{item["metadata"]["name"]} {about["type"]}: {about.get("message", "")}'
    for item in items
    for about in item.get('status', {}).get('conditions', [])
    if about['status'] == 'True'
  ]


def logs(given: flags.FlagValues) -> None:
  run, _ = door.read_launch(given, 'gke', remote=True)
  view.show_log(run, given.host)


def delete(given: flags.FlagValues) -> None:
  run, launch = door.read_launch(given, 'gke', remote=True)
  with identity.storage(run, 'write to'):
    identity.tell_deleted(run, _roles(launch))
  names = _named(launch, 'delete')
  print(kubectl.run(launch, *names, '--ignore-not-found'), end='')
  with identity.storage(run, 'write to'):  # Hosts may have spoken last.
    identity.tell_deleted(run, _roles(launch))
  print(f'{run.name}: {run} is left as it is', file=sys.stderr)
