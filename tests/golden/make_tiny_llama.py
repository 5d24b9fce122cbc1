"""Writes tiny_llama/: a random Llama and what transformers' PyTorch makes of it.

  python tests/golden/make_tiny_llama.py      (needs torch and transformers)

Grouped key-value heads, an untied unembedding, norms that are not ones; the
activations are those of our sites, taken with hooks.
"""

import pathlib

import numpy as np
import torch
from safetensors.numpy import save_file
from transformers import LlamaConfig, LlamaForCausalLM

HERE = pathlib.Path(__file__).parent / 'tiny_llama'


def main():
  config = LlamaConfig(
    vocab_size=50,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    rope_theta=500.0,
    tie_word_embeddings=False,
    bos_token_id=0,
  )
  torch.manual_seed(0)
  model = LlamaForCausalLM(config).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(0.2 * torch.randn_like(parameter))
  model.save_pretrained(HERE)
  ids = np.random.default_rng(0).integers(0, 50, (2, 40)).astype(np.int32)
  taken = {'ids': ids}

  def keep(name, value):
    taken[name] = value.detach().numpy().astype(np.float32).copy()

  def keep_input(name):
    return lambda module, inputs: keep(name, inputs[0])

  def keep_output(name):
    def hook(module, inputs, output):
      keep(name, output[0] if isinstance(output, tuple) else output)

    return hook

  for i, layer in enumerate(model.model.layers):
    layer.register_forward_hook(keep_output(f'resid_post.{i}'))
    layer.mlp.register_forward_hook(keep_output(f'mlp_out.{i}'))
    layer.mlp.down_proj.register_forward_pre_hook(keep_input(f'mlp_hidden.{i}'))
    layer.self_attn.o_proj.register_forward_pre_hook(
      keep_input(f'attn_pre_linear.{i}')
    )
  with torch.no_grad():
    keep('logits', model(torch.from_numpy(ids).long()).logits)
  save_file(taken, HERE / 'golden.safetensors')


if __name__ == '__main__':
  main()
