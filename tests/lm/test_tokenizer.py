"""Whether a model is used to a BOS in front of its texts."""

import json

import pytest
import tokenizers
from tokenizers.processors import TemplateProcessing

from gsae_jax.lm.text import resolve
from gsae_jax.lm.tokenizer import Tokenizer


def folder(tmp_path, *, template=None, **settings):
  words = tokenizers.models.WordLevel({'<s>': 0, '</s>': 1, 'a': 2}, '</s>')
  tokenizer = tokenizers.Tokenizer(words)
  tokenizer.add_special_tokens(['<s>', '</s>'])
  if template:
    special = [('<s>', 0), ('</s>', 1)]
    tokenizer.post_processor = TemplateProcessing(
      single=template, special_tokens=special
    )
  tokenizer.save(str(tmp_path / 'tokenizer.json'))
  settings = {'bos_token': '<s>'} | settings
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(settings))
  return str(tmp_path)


@pytest.mark.parametrize(
  'template, settings, adds',
  [
    ('<s> $A', {}, True),
    ('$A', {}, False),
    ('$A </s>', {}, False),
    ('</s> $A', {}, False),
    (None, {}, False),
    (None, {'add_bos_token': True}, True),
    ('$A', {'add_bos_token': True}, True),
    (None, {'add_bos_token': False}, False),
    ('<s> $A', {'add_bos_token': None}, True),
    ('<s> $A', {'bos_token': None}, False),
  ],
)
def test_the_policy_is_the_tokenizers(template, settings, adds, tmp_path):
  tokenizer = Tokenizer(folder(tmp_path, template=template, **settings))
  assert tokenizer.adds_bos is adds
  assert resolve({'prepend_bos': None}, tokenizer) == {'prepend_bos': adds}
  for said in (True, False):
    assert resolve({'prepend_bos': said}, tokenizer)['prepend_bos'] is said
  assert tokenizer.encode(['a']) == [[2]]  # Never a BOS of its own.


def test_the_real_llama_is_used_to_one_and_the_embedded_model_says_nothing(
  stories, embedded
):
  assert Tokenizer(str(stories[0])).adds_bos
  assert not embedded.tokenizer.adds_bos
