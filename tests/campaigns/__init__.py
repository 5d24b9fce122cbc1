"""Campaigns: many random trials of what one test cannot cover.

Kills, corrupted files, two processes of which one is lost, simulated orders of
events, and fuzzed input. A campaign is a test marked `@pytest.mark.campaign(N)`
with an argument `trial`: it runs for N trials. Everything that a trial draws is a
function of `--campaign-seed` (any text, '0' by default), the test's name and the
trial's number, which the test's id holds, so that a trial that fails can be
repeated alone. `--campaign-share=0.2` runs the first fifth of the trials of each
campaign; another seed makes them others.
"""
