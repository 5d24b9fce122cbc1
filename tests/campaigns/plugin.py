"""Pytest options of the campaigns, and the trials of each test."""

import pytest

from tests.campaigns.trials import Trial


def pytest_addoption(parser):
  group = parser.getgroup('campaigns')
  group.addoption(
    '--campaign-share',
    type=float,
    default=1.0,
    help='Share of the trials of each campaign to run, above 0 and up to 1.',
  )
  group.addoption(
    '--campaign-seed',
    default='0',
    help='Any text; what the trials draw is a function of it.',
  )


def pytest_configure(config):
  if not 0 < config.getoption('--campaign-share') <= 1:
    raise pytest.UsageError('--campaign-share must be above 0 and at most 1')
  config.addinivalue_line(
    'markers', 'campaign(trials): so many random trials of one test.'
  )


def pytest_generate_tests(metafunc):
  """Runs a campaign's test once for each of its trials; at least once."""
  mark = metafunc.definition.get_closest_marker('campaign')
  if mark is None:
    return
  (trials,) = mark.args
  share = metafunc.config.getoption('--campaign-share')
  seed = metafunc.config.getoption('--campaign-seed')
  name = metafunc.function.__name__
  metafunc.parametrize(
    'trial',
    [Trial(seed, name, i) for i in range(max(1, round(share * trials)))],
    ids=lambda trial: str(trial.index),
  )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
  """Says in a failure's message how to repeat the trial."""
  report = yield
  trial = getattr(item, 'callspec', None) and item.callspec.params.get('trial')
  if report.failed and isinstance(trial, Trial):
    report.sections.append(
      (
        str(trial),
        f"repeat it alone: pytest '{item.nodeid}' "
        f"--campaign-seed='{trial.seed}'",
      )
    )
  return report
