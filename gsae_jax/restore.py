"""`gsae_jax.load`: a trained SAE from wherever it was written."""

import functools
import json
from collections.abc import Callable
from typing import Any

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from etils import epath

from gsae_jax import paths
from gsae_jax.errors import UserError
from gsae_jax.sae import jumprelu, layers, make_module
from gsae_jax.training.checkpoints import SCHEMA, Checkpoints


class SAE:
  """A trained SAE; takes raw activations, whatever it was trained on.

  Attributes:
    params: dictionary of arrays with the paper's names; rows of `W_dec` are
      features.
    config: plain data: `name`, `architecture`, `site`, `width`, `features`,
      `l1`, `seed`, `learning_rate`, and `scale`, which activations were
      multiplied by in training and which is folded into `params`.
    metadata: plain data: the `step`, the run's `config`, the content hash of
      its `store`, and `store_identity` and `store_provenance`, which hold the
      language model's hashes and path.
  """

  def __init__(
    self,
    params: dict[str, jax.Array],
    config: dict[str, Any],
    metadata: dict[str, Any],
  ):
    self.params = params
    self.config = config
    self.metadata = metadata
    module = make_module(config)
    self._apply = {
      method: jax.jit(functools.partial(module.apply, method=method))
      for method in ('encode', 'decode')
    }

  def encode(self, x: jax.Array) -> jax.Array:
    """Features `[..., features]` of activations `[..., width]`."""
    x = self._checked(x, 'width')
    return self._apply['encode']({'params': self.params}, x)

  def decode(self, f: jax.Array) -> jax.Array:
    """Reconstructions `[..., width]` of features `[..., features]`."""
    f = self._checked(f, 'features')
    return self._apply['decode']({'params': self.params}, f)

  def __call__(self, x: jax.Array) -> jax.Array:
    """`decode(encode(x))`."""
    return self.decode(self.encode(x))

  def edit(
    self, change: Callable[[jax.Array], jax.Array]
  ) -> Callable[[jax.Array], jax.Array]:
    """An edit of this SAE's site in a language model, by features.

    What the SAE does not explain stays: rows whose features do not change keep
    their bits.

    Args:
      change: from features `[..., features]` to those that are wanted instead.

    Returns:
      a function of activations, for `edits` of `lm.transformer.Transformer`.
    """

    def edited(x: jax.Array) -> jax.Array:
      f = self.encode(x)
      moved = layers.product(change(f) - f, self.params['W_dec'], 'float32')
      return x + moved.astype(x.dtype)

    return edited

  def _checked(self, value: jax.Array, size: str) -> jax.Array:
    """Returns the value, cast to the parameters' dtype if its own is narrower."""
    if value.shape[-1] != self.config[size]:
      raise ValueError(
        f'the last axis has {value.shape[-1]} entries, and this SAE has '
        f'{size}={self.config[size]}'
      )
    dtype = self.params['W_dec'].dtype
    narrow = value.dtype.itemsize < dtype.itemsize
    return value.astype(dtype) if narrow else value

  def to_jumprelu(self) -> 'SAE':
    """The same SAE as a `gsae_jax.sae.jumprelu.JumpReluSAE` (Appendix E).

    Raises:
      UserError: its encoder is untied, which has no such form.
    """
    try:
      params = jumprelu.parameters(self.config['architecture'], self.params)
    except UserError as e:
      raise UserError(f'SAE {self.config["name"]!r}: {e}') from e
    return SAE(
      {k: jnp.asarray(v) for k, v in params.items()},
      self.config | {'architecture': 'jumprelu'},
      self.metadata,
    )

  def jumprelu_gap(self, x: jax.Array) -> dict[str, float]:
    """How far the JumpReLU form is from this SAE, on activations `[..., width]`.

    Returns:
      `gates`, how many entries of `f` are 0 in one and not in the other, of
      `entries`; and `largest`, the largest difference of all other entries.
      Rounding alone makes them: a gate differs where its input is 0 but for
      rounding, and then by the whole height of the jump.
    """
    ours, theirs = self.encode(x), self.to_jumprelu().encode(x)
    differ = (ours > 0) != (theirs > 0)
    return {
      'gates': int(jnp.sum(differ)),
      'entries': ours.size,
      'largest': float(jnp.max(jnp.where(differ, 0, jnp.abs(ours - theirs)))),
    }

  def save(self, folder: str) -> None:
    """Writes `sae.safetensors` and `sae.json`, which `load` reads."""
    path = epath.Path(folder).expanduser()
    path.mkdir(parents=True, exist_ok=True)
    arrays = {k: np.asarray(v) for k, v in self.params.items()}
    about = {'schema': SCHEMA, 'config': self.config, 'metadata': self.metadata}
    (path / 'sae.safetensors').write_bytes(safetensors.numpy.save(arrays))
    (path / 'sae.json').write_text(json.dumps(about, indent=1) + '\n')

  def __repr__(self) -> str:
    c = self.config
    return (
      f'SAE({c["name"]!r}, architecture={c["architecture"]!r}, '
      f'site={c["site"]!r}, width={c["width"]}, features={c["features"]}, '
      f'step={self.metadata["step"]})'
    )


def folder(path: str) -> epath.Path:
  """Where a `path` of `load` is; what is on the hub is downloaded first.

  Raises:
    UserError: the hub does not give it, or it is on storage that has none.
  """
  scheme, place = paths.split(path)
  if scheme != 'hf':
    return paths.workdir(path)
  repository, _, revision = place.partition('@')
  try:
    return epath.Path(
      huggingface_hub.snapshot_download(repository, revision=revision or None)
    )
  except Exception as e:  # A dozen network and hub errors, all the same here.
    raise UserError(
      f'{path} could not be downloaded ({type(e).__name__}); give '
      'hf://ORG/NAME or hf://ORG/NAME@REVISION, or download it where there is a '
      'network and give the folder'
    ) from e


def load(path: str, step: int | None = None, member: str | None = None) -> SAE:
  """Loads one SAE onto this process's first device.

  Args:
    path: a workdir, one of its checkpoints, or a folder that `SAE.save` wrote:
      local, `gs://`, or a repository of the Hugging Face hub, `hf://ORG/NAME`.
    step: which checkpoint of a workdir; None is the latest.
    member: which SAE of the run; may be None where there is only one.

  Raises:
    UserError: there is nothing to load, or the choice is not clear.
  """
  where = folder(path)
  if (where / 'sae.json').exists():
    return _load_exported(where)
  if where.parent.name == 'checkpoints' and where.name.isdigit():
    step = int(where.name) if step is None else step
    where = where.parent
  if where.name == 'checkpoints':
    where = where.parent
  with Checkpoints(str(where), read_only=True) as checkpoints:
    steps = checkpoints.steps()
    if not steps:
      raise UserError(f'no finished checkpoint in {where}')
    step = steps[-1] if step is None else step
    if step not in steps:
      known = ', '.join(map(str, steps))
      raise UserError(
        f'no checkpoint of step {step} in {where}; it has {known}'
      )
    metadata = checkpoints.metadata(step)
    members = {m['name']: m for m in metadata.pop('members')}
    stopped = metadata.pop('stopped')
    if member in stopped:
      raise UserError(
        f'member={member!r} was stopped at step {stopped[member]["step"]} '
        f'({stopped[member]["reason"]}); load step='
        f'{stopped[member]["last_checkpoint"]}'
      )
    if member is None and len(members) == 1:
      (member,) = members
    if member not in members:
      raise UserError(
        f'member={member!r}: the run at {where} has {", ".join(members)}; '
        'choose one'
      )
    config = members[member]
    shapes = config.pop('shapes')
    params = checkpoints.restore_params(step, {member: shapes})[member]
  return SAE(
    {k: jnp.asarray(v) for k, v in params.items()},
    config,
    metadata | {'step': step},
  )


def _load_exported(folder: epath.Path) -> SAE:
  try:
    about = json.loads((folder / 'sae.json').read_text())
    raw = (folder / 'sae.safetensors').read_bytes()
    arrays = safetensors.numpy.load(raw)
    schema = about['schema']
    if schema == SCHEMA:
      _check_export(about['config'], about['metadata'], arrays)
  except (
    ValueError, OSError, KeyError, TypeError, AttributeError, RecursionError,
    safetensors.SafetensorError,
  ) as e:  # fmt: skip
    raise UserError(
      f'{folder} is not an exported SAE ({type(e).__name__}: {e}); export or '
      'copy it again'
    ) from e
  if schema != SCHEMA:
    raise UserError(
      f'{folder}/sae.json has schema {schema}, and this version '
      f'reads {SCHEMA}; install the version that wrote it'
    )
  params = {k: jnp.asarray(v) for k, v in arrays.items()}
  return SAE(params, about['config'], about['metadata'])


def _check_export(
  config: dict[str, Any],
  metadata: dict[str, Any],
  arrays: dict[str, np.ndarray],
) -> None:
  """Raises an error unless the parts of an export fit together."""
  for name in ('name', 'site'):
    if not isinstance(config[name], str):
      raise ValueError(f'{name} is {config[name]!r}')
  int(metadata['step'])
  found = {name: value.shape for name, value in arrays.items()}
  sizes = config['features'], config['width']
  if found['W_dec'] != sizes:  # Before anything is made of these sizes.
    raise ValueError(f'W_dec is of shape {found["W_dec"]}, not {sizes}')
  module = make_module(config)
  x_BD = jax.ShapeDtypeStruct((1, config['width']), np.float32)
  wanted = jax.eval_shape(module.init, jax.random.key(0), x_BD)['params']
  if found != {name: value.shape for name, value in wanted.items()}:
    raise ValueError('its parameters are not those of its architecture')
