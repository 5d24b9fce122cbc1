"""What can be asked for: TPU slices, and where; checked before it is sent."""

import dataclasses
import math
import re
from collections.abc import Iterable

from gsae_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Generation:
  """A generation of TPUs.

  Attributes:
    type: what Cloud TPU calls a slice, with '{}' where its size belongs; None
      where only GKE has it.
    size_of_chip: what that size counts: chips, or cores of which a chip has 2.
    runtime: the image of its machines.
    gke: its name in GKE.
    one_host: numbers of chips that one machine has.
    topologies: the shapes that can be had.
  """

  type: str | None
  size_of_chip: int
  runtime: str | None
  gke: str
  one_host: tuple[int, ...]
  topologies: tuple[str, ...]


_FLAT = ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
_CUBIC = (
  '2x2x1', '2x2x2', '2x2x4', '2x4x4', '4x4x4', '4x4x8', '4x8x8', '8x8x8',
  '8x8x16', '8x16x16',
)  # fmt: skip

GENERATIONS = {
  'v4': Generation(
    'v4-{}', 2, 'tpu-ubuntu2204-base', 'tpu-v4-podslice', (4,), _CUBIC
  ),
  'v5e': Generation(
    'v5litepod-{}', 1, 'v2-alpha-tpuv5-lite', 'tpu-v5-lite-podslice',
    (1, 4, 8), _FLAT,
  ),
  'v5p': Generation(
    'v5p-{}', 2, 'v2-alpha-tpuv5', 'tpu-v5p-slice', (4,), _CUBIC
  ),
  'v6e': Generation(
    'v6e-{}', 1, 'v2-alpha-tpuv6e', 'tpu-v6e-slice', (1, 4, 8), _FLAT
  ),
  'tpu7x': Generation(None, 1, None, 'tpu7x', (4,), _CUBIC),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Slice:
  """TPU chips that are joined: as `v5e:4x4`, the way preflight writes them."""

  generation: str
  topology: str

  @property
  def chips(self) -> int:
    return math.prod(map(int, self.topology.split('x')))

  @property
  def chips_per_host(self) -> int:
    return self.chips if self.chips in self._of.one_host else 4

  @property
  def hosts(self) -> int:
    return self.chips // self.chips_per_host

  @property
  def accelerator_type(self) -> str | None:
    """Cloud TPU's name, such as v5litepod-16; None where it has none."""
    kind = self._of
    return kind.type and kind.type.format(self.chips * kind.size_of_chip)

  @property
  def runtime(self) -> str | None:
    return self._of.runtime

  @property
  def gke(self) -> str:
    return self._of.gke

  @property
  def _of(self) -> Generation:
    return GENERATIONS[self.generation]

  def __str__(self) -> str:
    return f'{self.generation}:{self.topology}'


def parse_slice(text: str, flag: str) -> Slice:
  """The slice that a flag names.

  Raises:
    UserError: there is none of that name; says which there are.
  """
  generation, _, topology = text.partition(':')
  if generation not in GENERATIONS:
    refuse_type(text, flag, GENERATIONS)
    raise UserError(
      f'{flag}: unknown accelerator {text!r}; give GENERATION:TOPOLOGY, as in '
      f'v5e:4x4, with one of {", ".join(GENERATIONS)}'
    )
  known = GENERATIONS[generation].topologies
  if topology not in known:
    raise UserError(
      f'{flag}: unknown topology {topology!r} of {generation}; it has '
      f'{", ".join(known)}'
    )
  return Slice(generation, topology)


def refuse_type(text: str, flag: str, generations: Iterable[str]) -> None:
  """Refuses Cloud TPU's name of a slice, and says ours."""
  for name in generations:
    for topology in GENERATIONS[name].topologies:
      slice_ = Slice(name, topology)
      if slice_.accelerator_type == text:
        raise UserError(f'{flag}: {text!r} is called {slice_} here; give that')


_REGION = r'[a-z]+-[a-z]+\d+'
_ZONE = _REGION + r'-(ai\d+)?[a-z]'  # us-south1-ai1b has AI chips only.
_PROJECT = r'([a-z][a-z0-9.-]*:)?[a-z][a-z0-9-]{4,28}[a-z0-9]'
# Suffixes of what is made for a run go behind: a Job's pods have the longest.
_NAME = r'[a-z]([a-z0-9-]{0,38}[a-z0-9])?'


def check_zone(zone: str) -> None:
  """Refuses what is not the name of a zone."""
  if re.fullmatch(_ZONE, zone):
    return
  what = 'a region' if re.fullmatch(_REGION, zone) else 'not a zone'
  raise UserError(f'--zone: {zone!r} is {what}; a zone is like us-central1-a')


def check_project(project: str) -> None:
  """Refuses what is not a project's id; its number and title are not either."""
  if not re.fullmatch(_PROJECT, project):
    raise UserError(
      f'--project: {project!r} is not the id of a project, which has 6 to 30 '
      'small letters, digits and hyphens; `gcloud projects list` shows it'
    )


def check_name(name: str) -> None:
  """Refuses names of runs that no cloud resource may have."""
  if not re.fullmatch(_NAME, name):
    raise UserError(
      f'--run: its last part, {name!r}, names the run and what is made for it: '
      'at most 40 small letters, digits and hyphens, the first a letter'
    )


def check_slices(count: int) -> None:
  if count < 1:
    raise UserError(f'--slices: {count} is too small; the least is 1')


@dataclasses.dataclass(frozen=True)
class TpuSpec:
  """What a request to Cloud TPU asks for."""

  project: str
  zone: str
  slice: Slice
  slices: int
  spot: bool
  runtime: str
  service_account: str | None
  network: str | None
  valid_hours: int | None

  def __post_init__(self):
    check_project(self.project)
    check_zone(self.zone)
    check_slices(self.slices)
    if self.slice.accelerator_type is None:
      raise UserError(
        f'--topology: Cloud TPU does not give {self.slice}; `python -m launch '
        'gke` does'
      )
    if self.valid_hours is not None and self.valid_hours < 1:
      raise UserError(
        f'--valid_hours: {self.valid_hours} is too small; the least is 1'
      )
    account = self.service_account
    if account is not None and not re.fullmatch(r'[^@\s]+@[^@\s]+', account):
      raise UserError(
        f'--service_account: {account!r} is not NAME@PROJECT.iam.'
        'gserviceaccount.com'
      )

  @property
  def parent(self) -> str:
    return f'projects/{self.project}/locations/{self.zone}'
