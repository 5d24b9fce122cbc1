"""Evaluates SAEs by splicing their reconstructions in, over all devices."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from gsae_jax.errors import UserError
from gsae_jax.evaluation import metrics, passes
from gsae_jax.evaluation.devices import Devices
from gsae_jax.evaluation.positions import Positions, Processes
from gsae_jax.evaluation.top import Top, empty_top, merged_tops
from gsae_jax.lm.contexts import Contexts
from gsae_jax.lm.layouts import Layout
from gsae_jax.lm.weights import LanguageModel

Member = tuple[nn.Module, str, dict[str, np.ndarray]]

# The two ways to count special tokens, the text's own first.
_OTHER = {'drop': 'keep', 'keep': 'drop'}


@dataclasses.dataclass(frozen=True)
class Measured:
  """What was measured of one SAE.

  Attributes:
    sums: `metrics.OF_SITE` and `metrics.OF_SAE`, float64 `[documents]` each.
    fired_F: tokens that each feature fired on.
    activation_F: sum of its activations; None where `top` is.
    top: contexts on which it is strongest, if they were asked for.
  """

  sums: dict[str, np.ndarray]
  fired_F: np.ndarray
  activation_F: np.ndarray | None = None
  top: Top | None = None


class Evaluator:
  """Evaluates SAEs on a fixed set of contexts.

  Attributes:
    ids: uint64, of the documents that sums are of.
    contexts_CL: token ids of the contexts, as `Measured.top` numbers them.
    mask_CL: which of their positions count.
  """

  def __init__(
    self,
    lm: LanguageModel,
    contexts: Contexts,
    *,
    tokens: int,
    batch_size: int,
    parallel: str,
    layout: Layout,
    both: bool = False,
    processes: Processes = Processes(),  # noqa: B008 -- it is frozen.
  ):
    """Fixes what is evaluated on.

    Args:
      lm: the language model.
      contexts: held-out text, with at least `tokens` positions in the mask.
      tokens: positions to count; those beyond are masked out.
      batch_size: contexts per pass, over all devices of this process.
      parallel: 'pmap', 'mesh' or 'auto'.
      layout: of the language model.
      both: count special tokens the other way, too.
      processes: who takes which batches.

    Raises:
      UserError: `batch_size` cannot be divided as the layout does.
    """
    if batch_size % layout.parts:
      raise UserError(
        f'eval.batch_size: {batch_size} is not divisible by {layout.parts}, over '
        'which contexts are divided'
      )
    self._lm = lm
    self._devices = Devices(parallel, layout)
    self._params = self._devices.language_model(lm)
    self._processes = processes
    rank_CL = np.cumsum(contexts.mask_CL).reshape(contexts.mask_CL.shape)
    mask_CL = contexts.mask_CL & (rank_CL <= tokens)
    policies = [(contexts, mask_CL)]
    if both:
      other = dataclasses.replace(
        contexts, special_tokens=_OTHER[contexts.special_tokens]
      )
      last = np.flatnonzero(mask_CL)[-1]
      until_CL = np.arange(mask_CL.size).reshape(mask_CL.shape) <= last
      policies.append((other, other.mask_CL & until_CL))
    self._policies = [Positions(c, mask, batch_size) for c, mask in policies]
    self.ids = self._policies[0].ids
    self.contexts_CL, self.mask_CL = contexts.ids_CL, mask_CL
    # One program per architecture, shape and site, for the evaluator's life.
    self._compiled = functools.lru_cache(None)(self._compile)

  def _compile(self, fn, *args):
    return self._devices.compile(functools.partial(fn, self._lm.module, *args))

  def run(
    self, saes: dict[str, Member], *, top_contexts: int = 0
  ) -> dict[str, tuple[Measured, ...]]:
    """Measures every SAE.

    Args:
      saes: module, site and parameters (for raw activations) by name.
      top_contexts: how many to find for each feature.

    Returns:
      by name, what was measured as the text counts special tokens, and, with
      `both`, then the other way.
    """
    return {
      name: measured
      for group in self._devices.groups(saes)
      for name, measured in self._run(group, top_contexts).items()
    }

  def _run(self, saes, top_contexts):
    """The same of SAEs whose parameters are on the devices together."""
    sites = tuple(dict.fromkeys(site for _, site, _ in saes.values()))
    new = tuple(site for site in sites if site not in self._policies[0].sites)
    self._find_means(new)
    params = {k: self._devices.sae(p) for k, (_, _, p) in saes.items()}
    runs = [
      _Run(self, policy, saes, params, new, 0 if i else top_contexts)
      for i, policy in enumerate(self._policies)
    ]
    for batch, ids in self._batches():
      hidden, taken = self._compiled(passes.clean_pass, sites)(
        self._params, ids
      ).kept
      for run in runs:
        run.launch(batch, ids, hidden, taken)
    found = [run.finish() for run in runs]
    return {name: tuple(f[name] for f in found) for name in saes}

  def logit_effects(
    self, site: str, W_dec_FD: np.ndarray, k: int
  ) -> dict[str, np.ndarray]:
    """The tokens that each feature makes likelier and less likely.

    Args:
      site: of the SAE.
      W_dec_FD: its decoder.
      k: how many, at most; vocabularies may be smaller.

    Returns:
      `logit_top_ids`, `logit_top_values`, `logit_bottom_ids` and
      `logit_bottom_values`, `[F, k]` each, the strongest first.
    """
    parts = self._devices.layout.parts
    vocabulary = self._lm.module.config.vocabulary
    program = self._compiled(passes.effects_pass, site, min(k, vocabulary))
    # So many rows at a time, on every device.
    rows = self._devices.logits(vocabulary) // vocabulary
    size = parts * min(-(-len(W_dec_FD) // parts), max(1, rows))
    blocks = []
    for start in range(0, len(W_dec_FD), size):
      d_ND = W_dec_FD[start : start + size]
      d_ND = np.pad(d_ND, ((0, size - len(d_ND)), (0, 0)))
      rows = program(self._params, self._devices.spread(d_ND)).rows
      blocks.append(self._devices.fetch(rows))
    joined = jax.tree.map(
      lambda *b: np.concatenate(b)[: len(W_dec_FD)], *blocks
    )
    return {
      f'logit_{end}_{name}': value
      for end, pair in joined.items()
      for name, value in zip(('values', 'ids'), pair, strict=True)
    }

  def _find_means(self, sites):
    """Means of the sites' activations over all that counts."""
    if not sites:
      return
    for policy in self._policies:
      sums = {
        s: np.zeros(self._lm.module.config.site_widths()[s]) for s in sites
      }
      for batch, ids in self._batches():
        mask = self._devices.spread(policy.masks[batch])
        program = self._compiled(passes.mean_pass, sites)
        for site, sum_D in program(self._params, ids, mask).sums.items():
          sums[site] += np.asarray(jax.device_get(sum_D), np.float64)
      for site, sum_PD in self._processes.gather(sums).items():
        mean_D = sum_PD.sum(0) / policy.mask_CL.sum()
        policy.means[site] = mean_D.astype(np.float32)

  def _batches(self) -> Iterator[tuple[int, Any]]:
    """Number and token ids of each of this process's batches."""
    batches = self._policies[0].batches
    for i in range(self._processes.index, len(batches), self._processes.count):
      yield i, self._devices.spread(batches[i])


class _Run:
  """One pass over the contexts with some SAEs and one policy."""

  def __init__(self, evaluator, policy, saes, params, new, top_contexts):
    self._of = evaluator
    self._policy = policy
    self._saes = saes
    self._params = params
    devices = evaluator._devices
    # An ablation does not depend on the SAE: once per site is enough.
    self._new = {site: policy.nothing(metrics.OF_SITE) for site in new}
    self._means = {s: devices.everywhere(policy.means[s]) for s in new}
    self._sums = {name: policy.nothing(metrics.OF_SAE) for name in saes}
    features = {name: p['W_dec'].shape[0] for name, (_, _, p) in saes.items()}
    names = ('fired', 'activation') if top_contexts else ('fired',)
    self._features = {
      name: {k: np.zeros(F) for k in names} for name, F in features.items()
    }
    self._top: dict[str, Any] | None = None
    if top_contexts:
      self._top = {
        name: devices.everywhere(empty_top(F, top_contexts))
        for name, F in features.items()
      }
    self._pending = None

  def launch(self, batch, ids, hidden, taken):
    """Starts a batch's programs, and then takes in what the one before gave."""
    of, devices = self._of, self._of._devices
    mask = devices.spread(self._policy.masks[batch])
    site_rows, rows, sums, others = {}, {}, {}, []
    cut = of._lm.module.config.cut
    # No more than it needs: or a program would be compiled for every group.
    starts = lambda site: {k: taken[k] for k in (site, *cut(site))}
    for site, mean in self._means.items():
      program = of._compiled(passes.ablated_pass, site)
      out = program(of._params, ids, mask, starts(site), mean)
      site_rows[site] = out.rows
      others += out.kept
    for name, (module, site, _) in self._saes.items():
      by_tiles = devices.decodes_by_tiles(module)
      program = of._compiled(passes.spliced_pass, module, site, by_tiles)
      heap = None
      if self._top is not None:
        size = len(self._policy.masks[batch])
        numbers = batch * size + np.arange(size, dtype=np.int32)
        heap = self._top[name], devices.spread(numbers)
      out = program(
        of._params, ids, mask, starts(site), self._params[name], heap
      )
      rows[name], sums[name] = out.rows, out.sums
      state, heap = out.kept
      others.append(state)
      if self._top is not None:
        self._top[name] = heap
    compare = of._compiled(
      passes.comparison,
      devices.parts_in_sight,
      devices.logits(of._lm.module.config.vocabulary),
    )
    losses = compare(of._params, ids, mask, hidden, tuple(others)).rows
    self._take()
    self._pending = batch, site_rows, rows, losses, sums

  def _take(self):
    """Adds up a batch that was started one batch ago: the device is not idle."""
    if self._pending is None:
      return
    batch, *rows, sums = self._pending
    site_rows, rows, losses = self._of._devices.fetch(rows)
    ce, kl = (np.moveaxis(losses[k], -1, 0) for k in ('ce', 'kl'))
    add = functools.partial(self._policy.add, batch=batch)
    for i, (site, totals) in enumerate(self._new.items()):
      values = site_rows[site] | {'ce_clean': losses['clean']}
      for j, name in enumerate(('zero', 'mean')):
        values |= {f'ce_{name}': ce[2 * i + j], f'kl_{name}': kl[2 * i + j]}
      add(totals, values=values)
    first = 2 * len(self._new)
    for i, (name, totals) in enumerate(self._sums.items(), first):
      own = {'ce_spliced': ce[i], 'kl_spliced': kl[i]}
      add(totals, values=rows[name] | own)
      for k, value_F in jax.device_get(sums[name]).items():
        self._features[name][k] += value_F
    self._pending = None

  def finish(self) -> dict[str, Measured]:
    self._take()
    of = self._of
    gathered = of._processes.gather((self._new, self._sums, self._features))
    new, sums, features = jax.tree.map(lambda v: v.sum(0), gathered)
    counted = self._policy.counted()
    for site, totals in new.items():
      self._policy.sites[site] = totals | counted
    tops: dict[str, Top | None] = dict.fromkeys(self._saes)
    for name, top in (self._top or {}).items():
      own = merged_tops(of._devices.each(top))
      of_all = of._processes.gather(own)
      tops[name] = merged_tops(
        [Top(*(v[p] for v in of_all)) for p in range(of._processes.count)]
      )
    return {
      name: Measured(
        self._policy.sites[site] | sums[name],
        features[name]['fired'],
        features[name].get('activation'),
        tops[name],
      )
      for name, (_, site, _) in self._saes.items()
    }
