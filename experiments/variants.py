r"""Every variant of the paper, trained on the same tokens.

The ablations of section 5.1, the loss whose L1 is weighted by decoder norms, and
baselines of equal width and of equal compute; then section 5.2's rescale & shift
on top of the baselines of equal width, in a run of its own.

  C=experiments/variants.py
  python -m gsae_jax.harvest  --config=$C --store=DIR/store
  python -m gsae_jax.train    --config=$C --store=DIR/store --workdir=DIR/run
  python -m gsae_jax.evaluate --config=$C --workdir=DIR/run
  python -m gsae_jax.train    --config=$C:baselines=DIR/run --store=DIR/store --workdir=DIR/shift
  python -m gsae_jax.evaluate --config=$C:baselines=DIR/run --workdir=DIR/shift

On stories260K, whose folder and text are given as for stories260k.py:
$C:stories260k, and $C:stories260k,baselines=DIR/run.

Takes 15 min for the embedded model and 10 min for stories260K on 2 CPU cores (AMD
EPYC, Python 3.11, JAX 0.10.2) that did other work beside. Gives, with seed 0 after
1.54 M activations per SAE, L0 at equal loss recovered over Gated's:

                             embedded   stories260K
  freeze_aux_decoder=False   1.21       1.10
  encoder='no_r_mag'         1.04       1.00
  encoder='untied'           0.99       1.02
  baseline, equal compute    1.95       1.66
  baseline, equal width      2.07       1.79
  rescale & shift on that    1.53       1.22

README.md has every variant's L0, loss recovered, gamma and alive features.
"""

import ml_collections

from experiments import quickstart, stories260k

L1 = (0.06, 0.12, 0.24)

# Name, architecture, variant. The equal-compute baseline is 1.5 times as wide.
VARIANTS = (
  ('gated', 'gated', {}),
  ('unfrozen', 'gated', {'freeze_aux_decoder': False}),
  ('no_r_mag', 'gated', {'encoder': 'no_r_mag'}),
  ('untied', 'gated', {'encoder': 'untied'}),
  ('centre', 'gated', {'centre_stop_gradient': True}),
  ('norms_frozen', 'gated', {'sparsity': 'decoder_norm_l1'}),
  (
    'norms_free',
    'gated',
    {'sparsity': 'decoder_norm_l1', 'freeze_aux_decoder': False},
  ),
  ('relu', 'relu', {}),
  ('relu_norms', 'relu', {'sparsity': 'decoder_norm_l1'}),
)


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  """The config.

  Args:
    arg: 'stories260k' for that model; 'baselines=WORKDIR' for the second run,
      on top of the first one's baselines; both with a comma between.
  """
  parts = arg.split(',') if arg else []
  baselines = None
  for part in parts:
    name, _, value = part.partition('=')
    if name == 'baselines' and value:
      baselines = value
    elif part != 'stories260k':
      raise ValueError(f'there is no variant {part!r} of this config')
  if 'stories260k' in parts:
    c = stories260k.get_config()
    c.sites = ('mlp_out.2',)
    features = 256
  else:
    c = quickstart.get_config()
    features = 512
  c.train.steps = 3_000
  c.train.checkpoint_every = c.train.get_ref('steps')
  rates = {'gated': 3e-3, 'relu': 6e-3}  # Tuned for each arm, see README.md.
  saes = []
  for l1 in L1:
    if baselines is not None:
      saes.append({
        'name': f'rescale_shift_{l1:g}', 'architecture': 'rescale_shift',
        'features': features, 'l1': 0.0, 'learning_rate': 3e-3,
        'baseline': baselines, 'baseline_member': f'relu_{l1:g}',
      })  # fmt: skip
      continue
    for name, architecture, variant in VARIANTS:
      saes.append({
        'name': f'{name}_{l1:g}', 'architecture': architecture,
        'features': features, 'l1': l1, 'learning_rate': rates[architecture],
        **variant,
      })  # fmt: skip
    saes.append({
      'name': f'relu_wide_{l1:g}', 'architecture': 'relu',
      'features': features * 3 // 2, 'l1': l1, 'learning_rate': rates['relu'],
    })  # fmt: skip
  c.saes = tuple(s | {'site': c.sites[0]} for s in saes)
  return c
