"""A hundred steps of the plain recipe, weight for weight, against others' code."""

import functools

import jax
import numpy as np
import pytest

from gsae_jax import sae
from gsae_jax.training import state as state_lib
from gsae_jax.training.dense import Recipe
from gsae_jax.training.schedule import Schedule
from gsae_jax.training.step import Hyperparameters, train_step
from tests.sae import reference

D, F, B, STEPS = 32, 128, 256, 100
L1, RATE = 0.1, 3e-4  # The paper's learning rate.
BOUND = (
  2e-5  # A gate that rounding opens may put a weight one update, 3e-4, off.
)


def activations(seed=0):
  """Fixed batches of planted sparse codes, `[STEPS, B, D]`, E||x||^2 = 1."""
  rng = np.random.default_rng(seed)
  directions = rng.normal(size=(64, D))
  shape = STEPS, B, 64
  codes = rng.exponential(size=shape) * (rng.random(shape) < 0.08)
  x = codes @ directions + 0.5
  return (x / np.sqrt((x**2).sum(-1).mean())).astype(np.float32)


def module_of(variant):
  architecture, options = reference.VARIANTS[variant]
  about = {'architecture': architecture, 'width': D, 'features': F}
  return sae.make_module(sae.VARIANTS | about | options, turned=True)


def ours(variant, batches):
  """First and last parameters of the train step."""
  module = module_of(variant)
  recipe = Recipe(
    schedule=Schedule(STEPS, 0, 0, 0, ()),
    dead_after=100,
    histogram_every=100,
    clip_norm=None,
    microbatches=1,
  )
  step = jax.jit(functools.partial(train_step, module=module, recipe=recipe))
  state = state_lib.init_member(module, state_lib.key_data(0))
  hyper = Hyperparameters(*map(np.float32, (RATE, L1, 1.0, 1.0)))
  host = lambda params: {
    k: np.asarray(v, np.float64) for k, v in state_lib.turn(params).items()
  }
  first = host(state.params)
  for x in batches:
    state, _ = step(state, x, hyper)
  return first, host(state.params)


def by_reference(variant, p, batches):
  """The last parameters of float64 NumPy, written from the equations."""
  architecture, options = reference.VARIANTS[variant]
  unit_rows = module_of(variant).unit_rows
  v = {k: np.zeros_like(w) for k, w in p.items()}
  for t, x in enumerate(batches):
    _, _, g = reference.LOSSES[architecture](
      p, x.astype(np.float64), L1, **options
    )
    p, v = reference.adam_step(p, g, v, t + 1, RATE, unit_rows=unit_rows)
  return p


def furthest(a, b):
  return max(np.abs(a[k] - b[k]).max() for k in a)


@pytest.mark.parametrize(
  'variant', [v for v in reference.VARIANTS if v != 'rescale_shift']
)
def test_every_weight_is_where_float64_puts_it(variant):
  batches = activations()
  first, last = ours(variant, batches)
  assert furthest(first, last) > 0.01
  bound = BOUND if variant in ('gated', 'relu') else 5 * BOUND
  assert furthest(last, by_reference(variant, first, batches)) <= bound


# What must fail the test above: each leaves the paper in one thing.
@pytest.mark.parametrize('variant', ['unfrozen', 'centre', 'no_r_mag'])
def test_another_loss_does_not_pass_for_the_papers(variant):
  batches = activations()
  first, last = ours(variant, batches)
  first = {'r_mag': np.zeros(F)} | first
  last = {'r_mag': np.zeros(F)} | last
  assert furthest(last, by_reference('gated', first, batches)) > 20 * BOUND


def test_dictionary_learning_gets_the_same_weights():
  torch = pytest.importorskip('torch')
  gdm = pytest.importorskip('dictionary_learning.trainers.gdm')
  batches = activations()
  first, last = ours('gated', batches)
  trainer = gdm.GatedSAETrainer(
    steps=STEPS, activation_dim=D, dict_size=F, layer=0, lm_name='none', lr=RATE,
    warmup_steps=0, sparsity_warmup_steps=None, l1_penalty=L1, device='cpu',
  )  # fmt: skip
  ae = trainer.ae
  tensor = lambda v: torch.tensor(v, dtype=torch.float32)
  with torch.no_grad():
    ae.encoder.weight.copy_(tensor(first['W_gate'].T))
    ae.decoder.weight.copy_(tensor(first['W_dec'].T))
    ae.decoder_bias.copy_(tensor(first['b_dec']))
    for name, parameter in (
      ('b_gate', ae.gate_bias), ('b_mag', ae.mag_bias), ('r_mag', ae.r_mag)
    ):  # fmt: skip
      parameter.copy_(tensor(first[name]))
  for step, x in enumerate(batches):
    trainer.update(step, torch.tensor(x))
  theirs = {
    'W_gate': ae.encoder.weight.T,
    'W_dec': ae.decoder.weight.T,
    'b_dec': ae.decoder_bias,
    'b_gate': ae.gate_bias,
    'b_mag': ae.mag_bias,
    'r_mag': ae.r_mag,
  }
  theirs = {k: v.detach().double().numpy() for k, v in theirs.items()}
  assert furthest(last, theirs) <= 2 * BOUND  # Both are float32.
