r"""Memory of a chip and collectives of harvest and evaluation, without a TPU.

  pip install --target LIBTPU --no-deps 'libtpu==0.0.42.*'    # what jax 0.10.2 wants
  PYTHONPATH=LIBTPU python -m benchmarks.tpu_memory [--only=WORD]

Compiles the very programs that harvest and evaluate run, for real topologies,
with the TPU's own compiler, which says what a chip will hold; nothing runs.
Prints the table of docs/models.md. Takes ten minutes on two cores.
"""

import argparse
import dataclasses
import functools

import jax
import jax.numpy as jnp

from benchmarks.topology import abstract, collectives, devices, totals
from gsae_jax.activations.forward import make_forward
from gsae_jax.evaluation import passes
from gsae_jax.evaluation.devices import Devices
from gsae_jax.lm.families import FAMILIES
from gsae_jax.lm.layouts import Layout, make_layout
from gsae_jax.lm.transformer import Transformer
from gsae_jax.lm.weights import is_below, parameter_shapes
from gsae_jax.sae import ARCHITECTURES

GEMMA_7B = {'model_type': 'gemma'}  # The defaults of its class.
PYTHIA_2P8B = {
  'model_type': 'gpt_neox', 'vocab_size': 50_304, 'hidden_size': 2560,
  'num_hidden_layers': 32, 'num_attention_heads': 32, 'bos_token_id': 0,
  'intermediate_size': 10_240, 'max_position_embeddings': 2048,
  'rotary_pct': 0.25, 'eos_token_id': 0,
}  # fmt: skip
GEMMA_SITES = ('resid_post.20', 'mlp_out.20', 'attn_pre_linear.20')
PYTHIA_SITES = ('resid_post.16', 'mlp_out.16', 'attn_pre_linear.16')


@dataclasses.dataclass(frozen=True)
class Case:
  """One program on one topology."""

  name: str
  topology: str
  raw: dict
  layout: str
  model: int
  program: str  # 'harvest', 'spliced' or 'comparison'.
  sites: tuple[str, ...]
  contexts: int
  length: int
  features: int = 131_072
  saes: int = 4


CASES = [
  Case(
    'Gemma-7B', 'v5e:2x4', GEMMA_7B, layout, model, program, GEMMA_SITES, 8, 1024
  )
  for layout, model in (('tensor', 8), ('fully_sharded', 1))
  for program in ('harvest', 'spliced', 'comparison')
] + [
  Case(
    'Pythia-2.8B', 'v5e:2x2', PYTHIA_2P8B, 'tensor', 4, program, PYTHIA_SITES,
    4, 2048,
  )
  for program in ('harvest', 'spliced', 'comparison')
]  # fmt: skip


def abstract_params(shapes: dict, layout: Layout, blocks: int | None) -> dict:
  """The tree of parameters that `LanguageModel.load` would give."""
  params = {}
  for path, shape in shapes.items():
    if blocks is None or is_below(path, blocks):
      node = params
      *parents, leaf = path.split('/')
      for parent in parents:
        node = node.setdefault(parent, {})
      node[leaf] = abstract(shape, jnp.bfloat16, layout.place(path, shape))
  return params


def compile_case(case: Case):
  chips = devices(case.topology)
  config = FAMILIES[case.raw['model_type']].config(case.raw)
  module = Transformer(config)
  layout = make_layout(case.layout, config, 0, chips, case.model)
  params = functools.partial(abstract_params, parameter_shapes(module), layout)
  shape = (case.contexts, case.length)
  ids = abstract(shape, jnp.int32, layout.contexts)
  mask = abstract(shape, jnp.bool_, layout.contexts)
  hidden = abstract((*shape, config.width), jnp.bfloat16, layout.contexts)
  placed = Devices('mesh', layout)
  if case.program == 'harvest':
    run = make_forward(module, layout, case.sites)
    lowered = run.lower(
      params(config.blocks_for(case.sites)),
      ids,
      dict.fromkeys(case.sites),
      dtype=jnp.bfloat16,
    )
  elif case.program == 'spliced':
    width = config.site_widths()[case.sites[0]]
    sae = ARCHITECTURES['gated'](width, case.features)
    shapes = jax.eval_shape(sae.init, jax.random.key(0), jnp.zeros((1, width)))[
      'params'
    ]
    sae_params = {
      name: abstract(s.shape, s.dtype, placed.place_sae(name, s.shape))
      for name, s in shapes.items()
    }
    fn = functools.partial(
      passes.spliced_pass, module, sae, case.sites[0], False
    )
    taken = {
      name: abstract((*shape, size), jnp.bfloat16, layout.contexts)
      for name, size in (
        (case.sites[0], width),
        *((cut, config.width) for cut in config.cut(case.sites[0])),
      )
    }
    lowered = placed.compile(fn).lower(
      params(None), ids, mask, taken, sae_params, None
    )
  else:
    most = placed.logits(config.vocabulary)
    fn = functools.partial(passes.comparison, module, layout.parts, most)
    others = (hidden,) * case.saes
    lowered = placed.compile(fn).lower(params(None), ids, mask, hidden, others)
  return lowered.compile()


def measure(case: Case) -> dict:
  compiled = compile_case(case)
  memory = compiled.memory_analysis()
  return {
    'parameters': memory.argument_size_in_bytes,
    'temporary': memory.temp_size_in_bytes,
    'peak': memory.peak_memory_in_bytes,
    'collectives': totals(collectives(compiled.as_text())),
  }


def row(case: Case, found: dict) -> str:
  sent = ', '.join(
    f'{count} {kind} {size / 2**20:,.0f} MiB'
    for kind, (count, size) in sorted(found['collectives'].items())
  )
  gib = lambda name: f'{found[name] / 2**30:.2f}'
  return (
    f'| {case.name}, {case.topology} | {case.layout}, model={case.model} '
    f'| {case.program} | {case.contexts} x {case.length} | {gib("parameters")} '
    f'| {gib("temporary")} | **{gib("peak")}** | {sent} |'
  )


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--only', default='', help='Part of a row.')
  only = parser.parse_args().only
  jax.config.update('jax_platforms', 'cpu')
  print(
    '| model, chips | layout | program | contexts | arguments, GiB | temporary '
    '| peak | sent by a chip |\n|---|---|---|---|---|---|---|---|'
  )
  for case in CASES:
    if only in f'{case.name} {case.layout} {case.program}':
      print(row(case, measure(case)), flush=True)


if __name__ == '__main__':
  main()
