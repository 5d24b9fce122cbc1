"""`python -m launch tpu`: the machines of a run as Cloud TPU queued resources."""

import json

from absl import flags

from gsae_jax.errors import UserError
from launch import door, identity, queued, specs, view
from launch.follow import follow
from launch.script import startup_script
from launch.submission import asked_before, check_hosts, date_of_packages


def define_flags(values: flags.FlagValues, verb: str) -> None:
  """Adds the flags of a verb."""
  door.define_run(values)
  if verb == 'submit':
    door.define_submission(values)
    door.define_machines(values)
    flags.DEFINE_string(
      'project', None, "Google Cloud's id of the project.", flag_values=values
    )
    flags.DEFINE_string('zone', None, 'Such as us-west4-a.', flag_values=values)
    flags.DEFINE_bool(
      'spot', False, 'Cheaper, and taken away at any time.', flag_values=values
    )
    flags.DEFINE_string(
      'runtime', None, "Image, if not the generation's own.", flag_values=values
    )
    flags.DEFINE_string(
      'service_account', None, 'Of the machines.', flag_values=values
    )
    flags.DEFINE_string(
      'network', None, "If not 'default'.", flag_values=values
    )
    flags.DEFINE_integer(
      'valid_hours', None, 'Give up waiting after so many.', flag_values=values
    )
    flags.DEFINE_bool(
      'keep', False, 'Leave the machines when all is over.', flag_values=values
    )
    flags.mark_flags_as_required(['project', 'zone'], values)
  door.define_following(values, verb, 30.0)


def _spec(
  given: flags.FlagValues,
  topology: str,
  flag: str,
  slices: int,
  runtime: str | None,
) -> specs.TpuSpec:
  slice_ = specs.parse_slice(topology, flag)
  return specs.TpuSpec(
    project=given.project,
    zone=given.zone,
    slice=slice_,
    slices=slices,
    spot=given.spot,
    runtime=runtime or slice_.runtime or '',
    service_account=given.service_account,
    network=given.network,
    valid_hours=given.valid_hours,
  )


def submit(given: flags.FlagValues) -> None:
  roles = {
    'trainer': _spec(
      given, given.topology, '--topology', given.slices, given.runtime
    )
  }
  if given.evaluator:
    roles['evaluator'] = _spec(given, given.evaluator, '--evaluator', 1, None)
  environment = door.read_environment(given)
  chips = roles['trainer'].slice.chips * given.slices
  run = door.read_submission(given, chips=chips, remote=True, bare=True)
  hosts = roles['trainer'].slice.hosts * given.slices
  check_hosts(run.store is None, hosts)
  dry = given.dry_run
  date = identity.now() if dry else date_of_packages(run.run)
  requests = {}
  for role, spec in roles.items():
    name = run.name_of(role)
    script = startup_script(
      run,
      role,
      apart='evaluator' in roles,
      date=date,
      environment=environment,
      queued_resource=None if given.keep else queued.name_of(spec, name),
    )
    request = queued.to_json(queued.build(spec, name, script))
    requests[role] = request
    if dry:
      print(json.dumps(request, indent=1))
      print(f'\n# startup.sh of the {role}\n{script}')
      print(queued.gcloud_line(spec, name))
  if dry:
    return
  cloud = queued.Cloud()
  # It may have been elsewhere, in another zone, or with an evaluator.
  asked = asked_before(run.run, 'tpu') or {'requests': {}}
  for request in (*asked['requests'].values(), *requests.values()):
    cloud.make_room(queued.full_name(request))
  run.record(
    'tpu',
    tuple(roles),
    {'date': date, 'keep': given.keep, 'requests': requests},
  )
  asked_for: list[str] = []
  for request in requests.values():
    try:
      cloud.create(queued.from_json(request))
    except UserError as e:
      if not asked_for:
        raise
      raise UserError(
        f'{e}; {asked_for[0]} was asked for before: python -m launch tpu delete '
        f'--run={run.run} takes it back'
      ) from e
    asked_for.append(queued.full_name(request))
  print(f'{run.name}: {hosts} hosts asked for; `launch tpu watch` follows it')


def status(given: flags.FlagValues) -> None:
  run, launch = door.read_launch(given, 'tpu', remote=True)
  cloud = queued.Cloud()
  for role, request in launch['requests'].items():
    state, why = cloud.state(queued.full_name(request))
    print(f'{role}: machines {state}{why and f" ({why})"}')
  view.show_state(run)


def watch(given: flags.FlagValues) -> None:
  run, launch = door.read_launch(given, 'tpu', remote=True)
  pause = door.make_pause(given.poll_seconds)
  follow(run, launch, queued.Cloud(pause=pause), pause)


def logs(given: flags.FlagValues) -> None:
  run, _ = door.read_launch(given, 'tpu', remote=True)
  view.show_log(run, given.host)


def delete(given: flags.FlagValues) -> None:
  run, launch = door.read_launch(given, 'tpu', remote=True)
  cloud = queued.Cloud(pause=door.make_pause())
  roles = tuple(launch['requests'])
  with identity.storage(run, 'write to'):  # Before, or `watch` asks again.
    identity.tell_deleted(run, roles)
  for request in launch['requests'].values():
    cloud.delete(queued.full_name(request))
  with identity.storage(run, 'write to'):  # Hosts may have spoken last.
    identity.tell_deleted(run, roles)
  print(f'{run.name}: its machines are gone; {run} is left as it is')
