from dynloss_ext import _extension as _extension

__version__ = "0.1.0"
