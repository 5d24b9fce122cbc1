"""One training step as others take it: SAELens, dictionary_learning, plain PyTorch.

Needs PyTorch and the package that is measured, not JAX. On a GPU all of them run
under bfloat16 autocast.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import synthetic
from benchmarks.settings import Settings
from benchmarks.turns import Side

# A step of batch `i`, the loss before it, and parameters by the paper's names.
Peer = tuple[Callable[[int], Any], float, Callable[[], dict[str, torch.Tensor]]]


def _autocast(s: Settings) -> torch.autocast:
  gpu = s.device == 'gpu'
  return torch.autocast('cuda' if gpu else 'cpu', torch.bfloat16, enabled=gpu)


@torch.no_grad()
def _fill(tensors: dict[str, torch.Tensor], params: dict[str, np.ndarray]):
  for name, tensor in tensors.items():
    tensor.copy_(torch.from_numpy(params[name]))


def _saelens(s: Settings, x: list[torch.Tensor], params) -> Peer:
  from sae_lens.config import SAETrainerConfig
  from sae_lens.saes.gated_sae import GatedTrainingSAE, GatedTrainingSAEConfig
  from sae_lens.training.sae_trainer import SAETrainer

  device = str(x[0].device)
  sae = GatedTrainingSAE(
    GatedTrainingSAEConfig(
      d_in=s.width,
      d_sae=s.features,
      dtype='float32',
      device=device,
      l1_coefficient=s.l1,
    )
  )
  tensors = {
    'W_gate': sae.W_enc,
    'W_dec': sae.W_dec,
    'b_gate': sae.b_gate,
    'r_mag': sae.r_mag,
    'b_mag': sae.b_mag,
    'b_dec': sae.b_dec,
  }
  _fill(tensors, params)
  config = SAETrainerConfig(
    total_training_samples=10**9,
    train_batch_size_samples=s.batch,
    lr=s.learning_rate,
    lr_end=s.learning_rate,
    device=device,
    autocast=s.device == 'gpu',
  )
  trainer = SAETrainer(config, sae, iter(()))

  def step(i):
    out = trainer.step(x[i])
    trainer.n_training_steps += 1
    return out.loss

  return step, float(step(0)), lambda: tensors


def _dictionary_learning(s: Settings, x: list[torch.Tensor], params) -> Peer:
  from dictionary_learning.trainers.gdm import GatedSAETrainer

  trainer = GatedSAETrainer(
    steps=10**6,
    activation_dim=s.width,
    dict_size=s.features,
    layer=0,
    lm_name='',
    lr=s.learning_rate,
    l1_penalty=s.l1,
    warmup_steps=0,
    sparsity_warmup_steps=None,
    seed=0,
    device=str(x[0].device),
  )
  sae = trainer.ae
  tensors = {
    'W_gate': sae.encoder.weight.T,
    'W_dec': sae.decoder.weight.T,
    'b_gate': sae.gate_bias,
    'r_mag': sae.r_mag,
    'b_mag': sae.mag_bias,
    'b_dec': sae.decoder_bias,
  }
  _fill(tensors, params)

  def step(i):
    with _autocast(s):
      trainer.update(i, x[i])

  with torch.no_grad(), _autocast(s):
    first = float(trainer.loss(x[0], 0))
  return step, first, lambda: tensors


def _torch(s: Settings, x: list[torch.Tensor], params) -> Peer:
  """By hand: the algebra of seven products, eager, with the fused Adam."""
  tensors = {
    k: torch.nn.Parameter(torch.from_numpy(v).to(x[0].device))
    for k, v in params.items()
  }
  W_gate, W_dec, b_dec = (tensors[k] for k in ('W_gate', 'W_dec', 'b_dec'))
  adam = torch.optim.Adam(
    tensors.values(), lr=s.learning_rate, betas=(0.0, 0.999), fused=True
  )

  def loss(x):
    with _autocast(s):
      a = x @ W_gate - b_dec @ W_gate
      pi = a + tensors['b_gate']
      gate = torch.relu(pi)
      magnitude = torch.relu(a * tensors['r_mag'].exp() + tensors['b_mag'])
      error = x - torch.addmm(b_dec, (pi > 0) * magnitude, W_dec)
      frozen = b_dec.detach(), gate, W_dec.detach()
      auxiliary = x - torch.addmm(*frozen)
      total = error.square().sum() + auxiliary.square().sum()
      return (total + s.l1 * gate.sum()) / s.batch

  def step(i):
    value = loss(x[i])
    adam.zero_grad()
    value.backward()
    with torch.no_grad():
      grad = W_dec.grad
      along = (grad * W_dec).sum(1, keepdim=True)
      grad.addcmul_(along, W_dec, value=-1)
      adam.step()
      W_dec.div_(W_dec.norm(dim=1, keepdim=True))
    return value

  return step, float(step(0)), lambda: tensors


PEERS = {
  'saelens': _saelens,
  'dictionary_learning': _dictionary_learning,
  'torch': _torch,
}


def make(name: str, s: Settings, folder: str) -> Side:
  """Builds a side; takes the first steps."""
  gpu = s.device == 'gpu'
  if not gpu:
    torch.set_num_threads(1)
  x_ND, params = synthetic.read(folder)
  device = 'cuda' if gpu else 'cpu'
  batches = [
    torch.from_numpy(x).to(device) for x in np.split(x_ND, synthetic.BATCHES)
  ]
  step, first, tensors = PEERS[name](s, batches, params)
  del params
  step(1)
  done = [2]
  wait = torch.cuda.synchronize if gpu else lambda: None

  def run():
    for _ in range(s.steps):
      step(done[0] % len(batches))
      done[0] += 1
    wait()

  def end():
    device_peak = torch.cuda.max_memory_allocated() if gpu else None
    host = {k: v.detach().cpu().numpy() for k, v in tensors().items()}
    with FlopCounterMode(display=False) as counter:
      step(0)
    return {
      'flops': counter.get_total_flops(),
      'l0': synthetic.open_gates(host, x_ND),
      'device_peak_bytes': device_peak,
    }

  run()
  device = torch.cuda.get_device_name() if gpu else 'cpu'
  return Side(run, {'first_loss': first, 'device': device}, end)
