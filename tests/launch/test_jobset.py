"""Manifests, held to the typed model of JobSet; kubectl, held by a stand-in."""

import stat

import pytest
import yaml
from kubeflow_trainer_api.models import JobsetV1alpha2JobSet

from gsae_jax.errors import UserError
from launch import jobset, kubectl
from launch.specs import parse_slice

SCRIPT = '#!/usr/bin/env bash\n# a: "b"\n\necho \'$x\'\n'


def manifest(topology='v5e:4x4', **changes):
  values = {
    'slice': parse_slice(topology, '--topology'),
    'slices': 1,
    'spot': False,
    'namespace': 'default',
    'queue': None,
    'image': 'python:3.12',
    'service_account': None,
  }
  return jobset.manifest(jobset.JobSpec(**values | changes), 'run1', SCRIPT)


@pytest.mark.parametrize(
  'changes',
  [
    {},
    {'topology': 'tpu7x:2x2x2', 'slices': 2},
    {'spot': True, 'queue': 'tpus', 'service_account': 'runs'},
  ],
)
def test_the_typed_model_takes_it_and_gives_it_back(changes):
  value = manifest(**changes)
  model = JobsetV1alpha2JobSet.from_dict(value)
  assert model.to_dict() == value
  assert (
    list(yaml.safe_load_all(kubectl.to_yaml([value, value]))) == [value] * 2
  )
  assert '&id' not in kubectl.to_yaml([value])


def test_hosts_chips_and_restarts():
  value = manifest('v5p:2x2x4', slices=2, spot=True, queue='tpus')
  spec = value['spec']
  (job,) = spec['replicatedJobs']
  inner = job['template']['spec']
  pod = inner['template']['spec']
  (container,) = pod['containers']
  assert job['replicas'] == 2
  assert inner['parallelism'] == inner['completions'] == 4
  assert inner['backoffLimit'] == 0 and pod['restartPolicy'] == 'Never'
  assert container['resources']['limits'] == {'google.com/tpu': '4'}
  assert container['command'] == ['bash', '-c', SCRIPT]
  assert pod['nodeSelector'] == {
    'cloud.google.com/gke-tpu-accelerator': 'tpu-v5p-slice',
    'cloud.google.com/gke-tpu-topology': '2x2x4',
    'cloud.google.com/gke-spot': 'true',
  }
  assert pod['terminationGracePeriodSeconds'] >= 60
  exit_codes, disruption = inner['podFailurePolicy']['rules']
  assert exit_codes['onExitCodes'] == {
    'containerName': container['name'], 'operator': 'In', 'values': [42],
  }  # fmt: skip
  assert disruption['onPodConditions'][0]['type'] == 'DisruptionTarget'
  (rule,) = spec['failurePolicy']['rules']
  assert rule['action'] == 'RestartJobSetAndIgnoreMaxRestarts'
  assert rule['onJobFailureReasons'] == ['PodFailurePolicy']
  assert value['metadata']['labels'] == {'kueue.x-k8s.io/queue-name': 'tpus'}
  topology = 'alpha.jobset.sigs.k8s.io/exclusive-topology'
  assert value['metadata']['annotations'][topology].endswith('gke-nodepool')


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
  """A program in kubectl's place, the only one there is."""

  def make(body):
    file = tmp_path / 'kubectl'
    file.write_text(f'#!/bin/sh\n{body}\n')
    file.chmod(file.stat().st_mode | stat.S_IXUSR)

  monkeypatch.setenv('PATH', str(tmp_path))
  return make


LAUNCH = {'namespace': 'n', 'context': 'c', 'jobsets': ['run1']}


@pytest.mark.integration
def test_kubectl_gets_the_manifest(stand_in):
  stand_in('echo "$@"; while read -r line; do echo "< $line"; done')
  printed = kubectl.run(LAUNCH, 'apply', '-f', '-', text='a: 1\n')
  assert printed == '--namespace=n --context=c apply -f -\n< a: 1\n'


@pytest.mark.integration
def test_kubectl_refuses_or_is_not_there(stand_in):
  with pytest.raises(UserError, match='kubectl is not installed; gcloud comp'):
    kubectl.run(LAUNCH, 'get')
  stand_in('echo warning >&2; echo "error: no matches for kind" >&2; exit 1')
  with pytest.raises(UserError) as refusal:
    kubectl.run(LAUNCH, 'apply')
  assert str(refusal.value).startswith(
    'kubectl apply: error: no matches for kind; see that'
  )
