r"""The paper's claims, what was measured of each here, and whether it holds.

  python -m experiments.paper.claims --config=experiments/paper/embedded.py --workdir=DIR

Prints the table, and writes claims.html and claims.json. The rules are in
docs/paper.md; they use 95 % intervals, so that "undecided" is what a study that is
too small says. Nothing here says what the claim is at another scale.
"""

import dataclasses
import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.paper import (
  ablations,
  beside,
  costs,
  fragments,
  history,
  rescale_shift,
  study,
  toy,
  verdicts,
)
from experiments.paper import (
  arms as arms_lib,
)
from experiments.paper import (
  ito as ito_lib,
)
from experiments.paper import (
  pareto as pareto_lib,
)
from experiments.paper.runs import Run
from gsae_jax import paths
from gsae_jax.activations.loader import Loader
from gsae_jax.activations.store import open_store
from gsae_jax.evaluation import bootstrap, frontiers, pareto
from gsae_jax.evaluation.frontiers import Estimate
from gsae_jax.evaluation.pareto import Record
from gsae_jax.restore import load

# At L0 where the baseline's gamma is below this there is shrinkage to solve.
_SHRUNK = 0.97
_UNBIASED = (0.98, 1.02)
_ALIVE = 0.6
# Of entries of f: rounding may decide a gate. Of the largest: what it leaves.
_GATES = 1e-5
_ROUNDING = 1e-5
# Relative, of counts of operations: what is not a product.
_SAME_COST = 0.02
# Of the wider baseline's operations, that Gated must take to be called equal.
_LEAST_COST = 0.85

_MARKS = {
  verdicts.HOLDS: '✓',
  verdicts.FAILS: '✗',
  verdicts.UNDECIDED: '?',
  verdicts.UNTESTED: '–',
}


@dataclasses.dataclass(frozen=True)
class Claim:
  """One claim at one site.

  Attributes:
    claim: in a line.
    place: where the paper makes it.
    paper: its number.
    site: '' where it is of none.
    measured: here.
    rule: when it holds.
    verdict: one of `verdicts`.
  """

  claim: str
  place: str
  paper: str
  site: str
  measured: str
  rule: str
  verdict: str


@dataclasses.dataclass(frozen=True)
class Findings:
  """What claims are judged by.

  Attributes:
    arms: the benchmark, with all of its checkpoints.
    everything: its last checkpoint, with those of ablations and shift.
    ito: the pursuits.
    site: of all but the first.
    shapes: width, Gated's and the baseline's features, by site.
    jumprelu: of a Gated SAE by site, `SAE.jumprelu_gap` and the largest `f`;
      none where activations are not stored.
    toy: `toy.results`.
  """

  arms: Run
  everything: Run
  ito: Run
  site: str
  shapes: Mapping[str, tuple[int, int, int]]
  jumprelu: Mapping[str, Mapping[str, float]]
  toy: Mapping[str, Any]


def judged(found: Findings) -> list[Claim]:
  """Every claim, in the order of the paper."""
  return [
    *_benchmark(found),
    *_shrinkage(found),
    *_costs(found),
    *_ablations(found),
    *_rescale_shift(found),
    *_dictionaries(found),
    *_equivalence(found),
    *_toy(found.toy),
    Claim(
      'Gated features are as interpretable as the baseline’s',
      '4.3',
      'difference +0.13 on a scale of 0 to 2 (90 % interval 0 to 0.26), '
      'p = .060',
      '',
      '–',
      'a blind study with human raters; no figure here stands in for one',
      verdicts.UNTESTED,
    ),
  ]


def _decisive(
  c: frontiers.Comparison | None, name: str = 'l0_ratio'
) -> Estimate | None:
  """An estimate of a comparison; of one seed, whose intervals leave training out,
  without its interval, so that it decides nothing.
  """
  if c is None or c.seeds > 1:
    return c and getattr(c, name)
  return Estimate(getattr(c, name).value, None)


def _benchmark(found: Findings) -> Iterator[Claim]:
  rows = beside.rows()
  histories = history.histories(found.arms)
  for site, c in pareto_lib.comparisons(found.arms).items():
    ratio = _decisive(c)
    seen = histories[site]
    state = 'settled' if seen and pareto.settled(seen) else 'not converged'
    text = f'L0 ratio {fragments.shown(ratio)} ({state})'
    for claim, place, bound in (
      ('Half the firing features at equal fidelity', 'abstract, 7', 0.5),
      ('At most 0.7 of them', 'our bar', 0.7),
      ('Fewer of them', 'abstract, 7', 1.0),
    ):
      yield Claim(
        claim,
        place,
        f'“half as many”; {rows.ratio_text()}',
        site,
        text,
        f'interval of the L0 ratio at equal loss recovered at or below {bound:g}',
        verdicts.below(ratio, bound),
      )
    yield Claim(
      'A Pareto improvement at equal training compute',
      '4.1, Fig. 1, 5, 12, 13',
      'at every site of Pythia-2.8B, and all but one MLP or residual site of '
      f'Gemma-7B; {rows.share_text()}',
      site,
      f'share of levels {fragments.shown(_decisive(c, "share"))}',
      'less L0 at every level of loss recovered that both reach, in the whole '
      'interval',
      verdicts.above(_decisive(c, 'share'), 1.0),
    )
    best = _best(found.arms, site)
    yield Claim(
      'The most loss is recovered by a Gated SAE',
      'Fig. 12',
      f'in every plot; {rows.best_text()}',
      site,
      f'Gated’s best less the baseline’s: {fragments.shown(best)}; at L0 '
      f'{_best_l0(found.arms, site)}',
      'interval of the difference above 0',
      verdicts.above(best, 0.0),
    )


def _best(arms: Run, site: str) -> Estimate | None:
  rng = np.random.default_rng(1)
  gated, relu = (
    frontiers.side(arms.at(site, name), arms.resampled, rng)
    for name in ('gated', 'relu')
  )
  if gated.point is None or relu.point is None:
    return None
  top = lambda f: np.nan if f is None else f.recovered[-1]
  value = top(gated.point) - top(relu.point)
  if min(gated.seeds, relu.seeds) == 1:
    return Estimate(value, None)
  drawn = [[top(f) for f in found.drawn] for found in (gated, relu)]
  return frontiers.estimate(value, np.subtract(*drawn))


def _best_l0(arms: Run, site: str) -> str:
  best = [
    max(arms.at(site, name), key=lambda r: r['loss_recovered'] or -np.inf)
    for name in ('gated', 'relu')
  ]
  return ' and '.join(f'{r["l0"]:.0f}' for r in best)


def _gamma(r: Record) -> Estimate:
  return Estimate(r['gamma'], r['intervals']['gamma'])


def _gammas(records: Sequence[Record]) -> list[Estimate]:
  return [_gamma(r) for r in records if r['gamma'] is not None]


def _span(values: Sequence[float], form: str = '{:.3f}') -> str:
  if not values:
    return '–'
  return f'{form.format(min(values))} to {form.format(max(values))}'


def _shrinkage(found: Findings) -> Iterator[Claim]:
  rows = beside.rows()
  for site in found.arms.sites:
    gated, relu = (found.arms.at(site, name) for name in ('gated', 'relu'))
    shrunk = [
      r['l0'] for r in relu if r['gamma'] is not None and r['gamma'] < _SHRUNK
    ]
    there = [
      r for r in gated if shrunk and min(shrunk) <= r['l0'] <= max(shrunk)
    ]
    gammas = _gammas(there)
    yield Claim(
      'Gated solves shrinkage',
      '4.2, Fig. 6, 14',
      f'γ ≈ 1; {rows.gamma_text()}',
      site,
      f'γ of {len(gammas)} Gated SAEs {_span([e.value for e in gammas])}, where '
      f'{len(shrunk)} baselines have less than {_SHRUNK:g}',
      f'where baselines of γ below {_SHRUNK:g} are, every Gated SAE’s interval '
      f'lies within {_UNBIASED[0]:g} to {_UNBIASED[1]:g}',
      verdicts.within(gammas, *_UNBIASED),
    )
    growth = _growth(relu, found.arms)
    yield Claim(
      'The baseline shrinks, and more as λ grows',
      '4.2, Fig. 6, 14',
      f'γ below 1; {rows.baseline_text()}',
      site,
      f'γ {_span([e.value for e in _gammas(relu)])}; smallest λ less largest: '
      f'{fragments.shown(growth)}',
      'interval of that difference above 0, and γ at the largest λ below 1',
      verdicts.both(
        [
          verdicts.above(growth, 0.0),
          *(verdicts.below(e, 1.0) for e in _gammas(_at_end(relu, max))),
        ]
      ),
    )
    alive = [r['alive_fraction'] for r in gated]
    most = sum(a >= _ALIVE for a in alive)
    yield Claim(
      'Few Gated features are dead',
      'Tables 1 to 8',
      f'60 to 100 % alive at most sites; {rows.alive_text()}',
      site,
      f'{_span(alive, "{:.1%}")} alive; {most} of {len(alive)} SAEs have '
      f'{_ALIVE:.0%} or more',
      f'at least three of four Gated SAEs have {_ALIVE:.0%} or more; counted on '
      'the evaluated tokens, without interval',
      verdicts.counted(4 * most >= 3 * len(alive)),
    )


def _at_end(records: Sequence[Record], end) -> list[Record]:
  l1 = end(r['l1_coefficient'] for r in records)
  return [r for r in records if r['l1_coefficient'] == l1]


def _growth(relu: Sequence[Record], arms: Run) -> Estimate | None:
  """The mean gamma over seeds at the smallest coefficient less the largest."""
  ends = [_at_end(relu, end) for end in (min, max)]
  if any(r['gamma'] is None for end in ends for r in end):
    return None
  rng = np.random.default_rng(1)

  def mean(end):
    drawn_RM = np.stack([arms.resampled[r['member']]['gamma'] for r in end], -1)
    counts_RM = bootstrap.seed_draws(
      [r['seed'] for r in end], len(drawn_RM), rng
    )
    return (
      np.mean([r['gamma'] for r in end]),
      np.average(drawn_RM, axis=-1, weights=counts_RM),
    )

  few, many = map(mean, ends)
  return frontiers.estimate(few[0] - many[0], few[1] - many[1])


def _costs(found: Findings) -> Iterator[Claim]:
  for site, (width, features, wide) in found.shapes.items():
    make = lambda name, f, w=width, **changes: costs.module_of(
      name, w, f, **changes
    )
    gated, relu = (make(name, features) for name in ('gated', 'relu'))
    flops = {m: costs.training_flops(m) for m in (gated, relu)}
    ratio = flops[gated] / flops[relu]
    yield Claim(
      'Training a step costs at most 1.5 times the baseline’s at equal width',
      '3.2.2',
      'at most 1.5',
      site,
      f'{ratio:.3f} times the operations (D = {width}, F = {features})',
      'at most 1.5, by XLA’s count for one gradient of the loss',
      verdicts.counted(ratio <= 1.5),
    )
    equal = flops[gated] / costs.training_flops(make('relu', wide))
    yield Claim(
      'The comparison is at equal training compute',
      '4.1',
      'the baseline has 1.5 times the features',
      site,
      f'Gated of {features} features: {equal:.3f} times the operations of the '
      f'baseline of {wide}',
      f'{_LEAST_COST:g} to {1 + _SAME_COST:g}',
      verdicts.counted(_LEAST_COST <= equal <= 1 + _SAME_COST),
    )
    extra = costs.parameters(gated) - costs.parameters(relu)
    yield Claim(
      'Gated has 2F more parameters at equal width',
      '3.2.1',
      '2F',
      site,
      f'{extra} more, F = {features}',
      'counted',
      verdicts.counted(extra == 2 * features),
    )
    inference = costs.inference_flops(make('jumprelu', features))
    inference /= costs.inference_flops(relu)
    yield Claim(
      'Inference costs what the baseline’s does',
      '3.2.1, E',
      'the same, in JumpReLU form',
      site,
      f'{inference:.3f} times the operations',
      f'within {_SAME_COST:.0%}, by XLA’s count for encoding and decoding',
      verdicts.counted(abs(inference - 1) <= _SAME_COST),
    )


def _ablations(found: Findings) -> Iterator[Claim]:
  site, run = found.site, found.everything
  c = ablations.comparisons(run, site)
  ratios = {name: _decisive(c[name]) for name in c}
  yield Claim(
    'Freezing the decoder of the auxiliary term matters',
    '5.1, Fig. 8',
    'worse without',
    site,
    f'L0 of unfrozen over Gated’s {fragments.shown(ratios["unfrozen"])}',
    'interval of the ratio at equal loss recovered above 1',
    verdicts.above(ratios['unfrozen'], 1.0),
  )
  others = {
    name: frontiers.compare(
      run.at(site, 'unfrozen'), run.at(site, name), run.resampled
    )
    for name in ('no_r_mag', 'untied')
  }
  yield Claim(
    'It matters most of all parts',
    '5.1, Fig. 8',
    'the most important ingredient',
    site,
    'L0 of unfrozen over that of '
    + ', '.join(
      f'{name} {fragments.shown(_decisive(o))}' for name, o in others.items()
    ),
    'both intervals above 1',
    verdicts.both([verdicts.above(_decisive(o), 1.0) for o in others.values()]),
  )
  yield Claim(
    'Without r_mag it is slightly worse',
    '5.1, Fig. 8',
    'slightly worse',
    site,
    f'L0 over Gated’s {fragments.shown(ratios["no_r_mag"])}',
    'interval above 1',
    verdicts.above(ratios['no_r_mag'], 1.0),
  )
  width, features, _ = found.shapes[site]
  tied, untied = (
    costs.parameters(costs.module_of('gated', width, features, encoder=e))
    for e in ('tied', 'untied')
  )
  yield Claim(
    'Untying the encoders gains nothing',
    '5.1, Fig. 8',
    'no gain, 50 % more parameters',
    site,
    f'L0 over Gated’s {fragments.shown(ratios["untied"])}, {untied / tied - 1:.0%} '
    'more parameters',
    'interval at or above 0.95: a gain of 5 % at most',
    verdicts.above(ratios['untied'], 0.95),
  )


def _rescale_shift(found: Findings) -> Iterator[Claim]:
  site, run = found.site, found.everything
  gammas = _gammas(run.at(site, arms_lib.RESCALE_SHIFT))
  yield Claim(
    'Rescale & shift resolves the baseline’s shrinkage',
    '5.2, Fig. 9',
    'γ ≈ 1',
    site,
    f'γ of {len(gammas)} SAEs {_span([e.value for e in gammas])}',
    f'every interval within {_UNBIASED[0]:g} to {_UNBIASED[1]:g}',
    verdicts.within(gammas, *_UNBIASED),
  )
  c = rescale_shift.comparisons(run, site)
  for title, claim, paper in (
    (
      rescale_shift.GAIN,
      'It improves its baseline',
      'only a little',
    ),
    (
      rescale_shift.GAP,
      'Gated stays above it: its directions are better',
      'a clear gap remains',
    ),
  ):
    ratio = _decisive(c[title])
    yield Claim(
      claim,
      '5.2, Fig. 9',
      paper,
      site,
      f'L0 ratio, {title}: {fragments.shown(ratio)}',
      'interval below 1',
      verdicts.below(ratio, 1.0),
    )


def _dictionaries(found: Findings) -> Iterator[Claim]:
  ito, site = found.ito, found.site
  c = ito_lib.comparison(ito)
  yield Claim(
    'Gated dictionaries are better without their encoders',
    'A, Fig. 10, 11',
    'a small but real advantage',
    site,
    f'L0 ratio of gradient pursuit {fragments.shown(_decisive(c))}',
    'interval below 1',
    verdicts.below(_decisive(c), 1.0),
  )
  gaps = ito_lib.gaps(ito)
  difference = None
  if len(gaps) == 2:
    difference = frontiers.estimate(
      gaps['relu'][0] - gaps['gated'][0], gaps['relu'][1] - gaps['gated'][1]
    )
    if len({r['seed'] for r in ito.last}) == 1:
      difference = Estimate(difference.value, None)
  yield Claim(
    'Pursuit gains less over Gated’s own encoder than over the baseline’s',
    'A, Fig. 10',
    'a smaller gap',
    site,
    f'baseline’s gap less Gated’s: {fragments.shown(difference)}',
    'interval above 0',
    verdicts.above(difference, 0.0),
  )
  for arm, title in (('gated', 'Gated'), ('relu', 'baseline')):
    few, many = _ends(
      [d for d in ito_lib.dictionaries(ito) if d.own['architecture'] == arm]
    )
    records = lambda of: [r for d in of for r in d.gradient]
    trained = frontiers.compare(records(many), records(few), ito.resampled)
    spans = [_span([d.own['l0'] for d in of], '{:.0f}') for of in (few, many)]
    yield Claim(
      f'Dictionaries trained at larger L0 are better for pursuit ({title})',
      'A, Fig. 11',
      'L0 of 100 is often better than of 10',
      site,
      f'trained to L0 {spans[1]} over those to {spans[0]}: L0 ratio '
      f'{fragments.shown(_decisive(trained))}',
      'interval below 1, of dictionaries within a factor of two of L0 10 and 100',
      verdicts.below(_decisive(trained), 1.0)
      if few and many
      else verdicts.UNTESTED,
    )


def _ends(found: Sequence[ito_lib.Dictionary]):
  """Those trained to about 10 features a token, and to about 100."""
  first, *_, last = ito_lib.TARGETS
  return tuple(
    [d for d in found if target / 2 <= d.own['l0'] <= target * 2]
    for target in (first, last)
  )


def _equivalence(found: Findings) -> Iterator[Claim]:
  for site in found.arms.sites:
    gap = found.jumprelu.get(site)
    measured, verdict = 'no store of activations', verdicts.UNTESTED
    if gap is not None:
      measured = (
        f'{gap["gates"]} of {gap["entries"]:,} gates differ; elsewhere features '
        f'of up to {gap["scale"]:.2g} differ by at most {gap["largest"]:.2g}'
      )
      verdict = verdicts.counted(
        gap['gates'] <= _GATES * gap['entries']
        and gap['largest'] <= _ROUNDING * gap['scale']
      )
    yield Claim(
      'A tied Gated SAE is a JumpReLU SAE',
      '3.2.1, E',
      'exactly',
      site,
      measured,
      f'gates differ in at most {_GATES:g} of the entries, and all else by '
      f'{_ROUNDING:g} of the largest, which is rounding',
      verdict,
    )


def _toy(results: Mapping[str, Any]) -> Iterator[Claim]:
  relu, jumprelu = results['relu'], results['jumprelu']
  yield Claim(
    'Toy model: a JumpReLU is right everywhere above the threshold, a ReLU not',
    'F, Fig. 15',
    'reconstructs perfectly above 1',
    '',
    f'mean squared error above 1: ReLU {relu["error_above"]:.4f}, JumpReLU '
    f'{jumprelu["error_above"]:.4f}',
    'exact: the JumpReLU’s is 0 and the ReLU’s is not',
    verdicts.counted(jumprelu['error_above'] < 1e-12 < relu['error_above']),
  )


_COLUMNS = ('', 'claim', 'site', 'measured here', 'paper', 'where', 'rule')


def fragment(found: Sequence[Claim]) -> str:
  rows = [
    [
      f'{_MARKS[c.verdict]} {c.verdict}', c.claim, c.site, c.measured, c.paper,
      c.place, c.rule,
    ]
    for c in found
  ]  # fmt: skip
  count = {v: sum(c.verdict == v for c in found) for v in _MARKS}
  return fragments.section(
    'The paper’s claims',
    ', '.join(f'{verdict}: {n}' for verdict, n in count.items())
    + '. Brackets are 95 % intervals.',
    fragments.table(_COLUMNS, rows, wrapped=True),
  )


def text(found: Sequence[Claim]) -> str:
  """For a terminal: verdict, claim and site, and below it what was measured."""
  lines = []
  for c in found:
    where = f' [{c.site}]' if c.site else ''
    lines.append(f'{_MARKS[c.verdict]} {c.verdict:<15} {c.claim}{where}')
    lines.append(textwrap.indent(c.measured, ' ' * 18))
  return '\n'.join(lines)


def findings(s: study.Study) -> Findings:
  """Runs what there is to run."""
  everything = s.results(*study.PARTS)
  ito = ito_lib.measure(s)
  arms = s.results('arms')
  gaps, widths = {}, {}
  for site, (gated, _) in s.pairs.items():
    middle = arms_lib.some(gated.coefficients(s.coefficients), 3)[1]
    name = gated.member('gated', middle, 0)['name']
    sae = load(str(s.folder('arms')), member=name)
    widths[site] = sae.config['width']
    if s.store:
      x_BD = _activations(s.store, site)
      gaps[site] = sae.jumprelu_gap(x_BD) | {
        'scale': float(np.max(sae.encode(x_BD)))
      }
  shapes = {
    site: (widths[site], gated.features, relu.features)
    for site, (gated, relu) in s.pairs.items()
  }
  return Findings(
    arms, everything, ito, s.ablation_site, shapes, gaps, toy.results()
  )


def _activations(store: str, site: str) -> np.ndarray:
  """Some thousand rows."""
  opened = open_store(store)
  rows = opened.chunk_rows * max(1, min(4096, opened.rows) // opened.chunk_rows)
  loader = Loader(
    opened, (site,), batch_size=rows, seed=0, unit='chunk', shuffle_rows=rows
  )
  return np.asarray(loader.rows_at(0, site), np.float32)


def write(s: study.Study, found: Sequence[Claim]) -> None:
  """claims.json, and the table on the terminal."""
  plain = [dataclasses.asdict(c) for c in found]
  written = json.dumps(plain, indent=1, ensure_ascii=False) + '\n'
  paths.write_whole(s.workdir / 'claims.json', written)
  print(text(found))


def make(s: study.Study) -> str:
  found = judged(findings(s))
  write(s, found)
  return fragment(found)


if __name__ == '__main__':
  study.draw('claims', make)
