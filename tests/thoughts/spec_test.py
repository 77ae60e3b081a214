"""Combinations of thought options that mean nothing, each refused once and with its reason."""

import itertools

import pytest

from thinking_lm.config import parse
from thinking_lm.errors import ConfigError
from thinking_lm.thoughts.placement import PLACEMENTS
from thinking_lm.thoughts.spec import ThoughtConfig
from thinking_lm.thoughts.tokens import KINDS
from thinking_lm.thoughts.topology import TOPOLOGIES


@pytest.mark.parametrize(
  "values,message",
  [
    (dict(kind="latent", length=1, samples=2), "samples 2 of kind 'latent' would all be equal"),
    (dict(topology="private", lookahead=0), "lookahead 0 (the rest of the document) needs topology 'persistent'"),
    (dict(kind="soft", temperature=0.0), "kind 'soft' needs a temperature above 0"),
    (dict(kind="gumbel", temperature=0.0), "kind 'gumbel' needs a temperature above 0"),
    (dict(kind="noisy", temperature=0.0), "kind 'noisy' needs a temperature above 0"),
    (dict(kind="noisy", noise=0.0), "config.noise must be greater than 0"),
    (dict(kind="noisy", length=1, halting="stop"), "needs kind 'sampled', which can draw STOP"),
    (dict(kind="soft", temperature_end=0.1, temperature_steps=10), "read by kind 'gumbel' only, got kind 'soft'"),
    (dict(kind="gumbel", temperature_end=0.1), "temperature_end and temperature_steps go together"),
    (dict(kind="gumbel", temperature_end=1e-5, temperature_steps=10), "temperature_end must be 0 or at least 0.001"),
    (dict(kind="latent", temperature=0.5), "temperature is not read by kind 'latent'"),
    (dict(kind="sampled", temperature=1e-9), "is neither 0 (the most likely token) nor at least 0.001"),
    (dict(kind="latent", length=1, halting="stop"), "needs kind 'sampled', which can draw STOP"),
    (dict(placement="explicit"), "placement 'explicit' needs positions"),
    (dict(placement="sentence", length=1, cap=2), "placement 'sentence' needs room: shapes are static"),
    (dict(placement="none", length=1), "placement 'none' never thinks"),
    (dict(stride=0), "config.stride must be at least 1, got 0"),
    (dict(positions=(1, -1)), "config.positions must be at least 0, got -1"),
    (dict(length=-1), "config.length must be at least 0, got -1"),
    (dict(temperature=-0.5), "config.temperature must be at least 0, got -0.5"),
    (dict(samples=0), "config.samples must be at least 1, got 0"),
    (dict(kind="dream"), "unknown name 'dream'; known: "),
    (dict(topology="public"), "unknown name 'public'; known: persistent, private"),
    (dict(placement="never"), "unknown name 'never'; known: "),
    (dict(rotary="none"), "unknown name 'none'; known: advance, anchor"),
    (dict(halting="soon"), "unknown name 'soon'; known: "),
    (dict(delimiters=1), "config.delimiters must be bool, got 1 (int)"),
  ],
)
def test_faults_of_a_thought_config(values, message):
  with pytest.raises(ConfigError) as caught:
    parse(ThoughtConfig, values)
  assert [message in line for line in caught.value.faults] == [True]


def test_a_temperature_that_decays():
  config = ThoughtConfig(kind="gumbel", temperature=2.0, temperature_end=0.5, temperature_steps=10)
  temperatures = [float(config.at(step).temperature) for step in (0, 5, 10, 99)]
  assert temperatures == pytest.approx([2.0, 1.0, 0.5, 0.5])
  constant = ThoughtConfig(kind="gumbel", temperature=2.0)
  assert constant.at(7) is constant


def test_all_faults_are_told_at_once():
  values = dict(
    topology="private", lookahead=0, kind="soft", temperature=0.0, placement="explicit", samples=3, length=2
  )
  with pytest.raises(ConfigError) as caught:
    parse(ThoughtConfig, values)
  assert len(caught.value.faults) == 4


def test_every_kind_goes_with_every_topology_and_placement():
  options = dict(explicit=dict(positions=(1,)), sentence=dict(room=2), entropy=dict(room=2))
  for kind, topology, placement in itertools.product(KINDS, TOPOLOGIES, PLACEMENTS):
    if placement != "none":
      values = dict(kind=kind, topology=topology, placement=placement, length=2, **options.get(placement, {}))
      assert not parse(ThoughtConfig, values).faults()


@pytest.mark.parametrize("length,delimiters,slots", [(0, False, 0), (0, True, 0), (3, False, 3), (3, True, 5)])
def test_the_length_counts_think_tokens_and_not_delimiters(length, delimiters, slots):
  config = ThoughtConfig(length=length, delimiters=delimiters)
  assert config.slots == slots
