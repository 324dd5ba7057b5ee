"""Waveforms: files, rows, v-diffusion and its sampler."""
