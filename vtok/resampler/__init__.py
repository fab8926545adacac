"""Ordered visual tokens for vision-language models: a resampler whose every prefix is a coarser picture."""

from vtok.resampler.config import ResamplerConfig
from vtok.resampler.files import find, load, save
from vtok.resampler.layout import Plan, plan
from vtok.resampler.reader import FeatureReader
from vtok.resampler.resampler import OrderedResampler

__all__ = ["FeatureReader", "OrderedResampler", "Plan", "ResamplerConfig", "find", "load", "plan", "save"]
