"""Frontiers, and the page that is drawn from records alone."""

import html.parser
import re

import numpy as np
import pytest

from gsae_jax.evaluation import figures, page, pareto


def record(member, architecture, l0, recovered, **changes):
  values = {
    'member': member, 'site': 'mlp_out.0', 'architecture': architecture,
    'variant': '', 'features': 512, 'l1_coefficient': 0.1, 'seed': 0, 'step': 100,
    'tokens_trained': 51200, 'l0': l0, 'loss_recovered': recovered,
    'ce_clean': 3.4, 'ce_spliced': 3.5, 'ce_zero_ablation': 5.0,
    'kl_clean_spliced': 0.1, 'gamma': 0.99, 'explained_variance': 0.9,
    'mse': 1.0, 'cosine': 0.9, 'alive_fraction': 1.0, 'num_tokens': 1000,
    'evaluation': {},
  }  # fmt: skip
  return values | changes


def two_arms(factor, step=100):
  """Baseline frontier, and one that needs `factor` of its L0 everywhere."""
  recovered = [0.6, 0.7, 0.8, 0.9]
  relu = [
    record(f'r{i}', 'relu', 10 * 2**i, r) for i, r in enumerate(recovered)
  ]
  gated = [
    record(f'g{i}', 'gated', factor * 10 * 2**i, r)
    for i, r in enumerate(recovered)
  ]
  own = {'step': step, 'tokens_trained': 512 * step}
  return [r | own for r in relu + gated]


def test_frontier_keeps_what_nothing_beats():
  records = [
    record('a', 'gated', 10, 0.5),
    record('worse', 'gated', 12, 0.4),
    record('b', 'gated', 20, 0.8),
    record('same l0, worse', 'gated', 20, 0.7),
    record('dead', 'gated', 0, 0.1),
  ]
  assert [r['member'] for r in pareto.frontier(records)] == ['a', 'b']


@pytest.mark.parametrize('factor', [0.4, 1.0, 1.7])
def test_l0_ratio_at_equal_loss_recovered(factor):
  ratio = pareto.compare(two_arms(factor), 'gated', 'relu').l0_ratio.value
  np.testing.assert_allclose(ratio, factor, rtol=1e-12)


def test_l0_ratio_without_a_common_range():
  records = [r for r in two_arms(0.5) if r['architecture'] == 'relu']
  apart = [record('x', 'gated', 5, 0.1), record('y', 'gated', 6, 0.2)]
  assert pareto.compare(records + apart, 'gated', 'relu') is None
  assert pareto.compare(records, 'gated', 'relu') is None


def test_table_has_a_row_per_record_and_survives_a_silent_sae():
  records = two_arms(0.5) + [record('silent', 'relu', 0.0, 0.0, gamma=None)]
  lines = pareto.table(records).splitlines()
  assert len(lines) == 10 and len({len(line) for line in lines}) == 1
  assert '–' in lines[5] and 'silent' in lines[5]


def test_summary_says_where_the_ratio_still_moves():
  moving = pareto.summary({50: two_arms(0.8, 50), 100: two_arms(0.5)})
  assert moving.endswith(
    'mlp_out.0: L0 of Gated over baseline at equal loss recovered is 0.500 '
    'after 51,200 activations each (not converged)'
  )
  level = pareto.summary({50: two_arms(0.51, 50), 100: two_arms(0.5, 100)})
  assert '(settled)' in level
  # Agreeing with a checkpoint near the end shows nothing.
  late = pareto.summary({90: two_arms(0.51, 90), 100: two_arms(0.5, 100)})
  assert '(not converged)' in late
  assert '(not converged)' in pareto.summary({10: two_arms(0.5)})
  assert 'L0 of' not in pareto.summary({10: two_arms(0.5)[:4]})


class Checker(html.parser.HTMLParser):
  """Collects tags left open, and everything that could fetch or run."""

  VOID = {'meta', 'br'}

  def __init__(self):
    super().__init__()
    self.open, self.tags, self.values, self.text = [], [], [], []

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.values += [v or '' for _, v in attrs]
    if tag not in self.VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.tags.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.text.append(data)


def rendered(**changes):
  values = {
    'title': 'run',
    'evaluations': {50: two_arms(0.8, 50), 100: two_arms(0.5)},
    'metrics': [
      {'step': s, 'tokens': s, 'member': m, 'loss': 1 / s, 'l0': 50 / s,
       'alive_fraction': 1.0}
      for s in (1, 2, 3) for m in ('g0', 'r0')
    ],
  }  # fmt: skip
  text = page.render(**values | changes)
  checker = Checker()
  checker.feed(text)
  assert not checker.open
  return text, checker


def test_page_is_one_file_that_fetches_and_runs_nothing():
  text, checker = rendered()
  assert not {'script', 'link', 'img', 'iframe'} & set(checker.tags)
  assert not re.search(r'https?:|url\(|@import|//[a-z]', text)
  assert checker.tags.count('svg') == 7
  assert checker.tags.count('tr') == 9


def test_page_shows_the_numbers():
  _, checker = rendered()
  shown = ' '.join(checker.text)
  assert '0.50' in checker.text  # The L0 ratio's card.
  assert '0.990–0.990' in checker.text
  assert 'not converged' in shown  # 0.8 at step 50, 0.5 at step 100.
  assert '51,200 activations' in shown and '1,000 held-out tokens' in shown
  _, checker = rendered(evaluations={50: two_arms(0.5, 50), 100: two_arms(0.5)})
  assert 'not converged' not in ' '.join(checker.text)


def test_text_in_records_is_escaped():
  evil = '<script>alert("x")</script>&\'"'
  records = [
    {**r, 'member': evil, 'site': evil, 'architecture': evil}
    for r in two_arms(0.5)
  ]
  text, checker = rendered(
    title=evil,
    evaluations={1: records},
    metrics=[{'step': 1, 'member': evil, 'loss': 1.0}],
  )
  assert 'script' not in checker.tags
  assert '<script' not in text


def test_page_with_one_sae_and_nothing_trained():
  text, checker = rendered(
    evaluations={0: [record('a', 'relu', 0.0, None, gamma=None)]},
    metrics=[{'step': 1, 'member': 'a', 'loss': None, 'l0': '1'}],
  )
  assert 'Nothing to draw yet' in ' '.join(checker.text)
  assert 'nan' not in text.lower()


def test_axes_map_ends_and_choose_round_ticks():
  axis = figures.Axis([0.0, 10.0], False, 0, 112)
  np.testing.assert_allclose([axis(0.0), axis(10.0)], [6, 106])
  assert axis.ticks() == [0, 2, 4, 6, 8, 10]
  log = figures.Axis([1.0, 1000.0], True, 0, 100)
  np.testing.assert_allclose(log(10.0) - log(1.0), log(100.0) - log(10.0))
  np.testing.assert_allclose(log.ticks(), [1, 10, 100, 1000])
  flat = figures.Axis([5.0, 5.0], False, 0, 100)
  assert flat(5.0) == 50 and 5.0 in flat.ticks()
  assert [figures.number(v) for v in (0, 0.25, 20000, 2.5e6)] == [
    '0', '0.25', '20k', '2.5M'
  ]  # fmt: skip


def test_lines_and_points_of_a_figure_lie_within_its_frame():
  points = [(0.5, 1.0, ''), (30.0, -4.0, '')]
  svg = figures.figure(
    [figures.Series('a', 'gated', points)],
    x_label='x', y_label='y', title='t', log_x=True, guide=0.0,
  )  # fmt: skip
  bounds = {
    'x': (figures.LEFT, figures.WIDTH - figures.RIGHT),
    'y': (figures.TOP, figures.HEIGHT - figures.BOTTOM),
  }
  lines = re.findall(r'<line [^>]*>', svg)
  assert len(lines) > 6
  for axis, (low, high) in bounds.items():
    found = re.findall(rf' c?{axis}[12]?="([\d.]+)"', ''.join(lines))
    found += re.findall(rf'<circle [^>]*c{axis}="([\d.]+)"', svg)
    values = sorted(map(float, found))
    assert low <= values[0] and values[-1] <= high
  # Each grid line goes all the way across.
  across = re.findall(r'class="grid" x1="(\d+)" x2="(\d+)"', svg)
  assert set(across) == {tuple(map(str, bounds['x']))}
