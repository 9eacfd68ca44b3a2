"""The core of Align: recipes, run directories, models, roles and the maths of PPO.

Importing this package does not import torch, so that ``align --help``, recipe errors and the
check for finished stages answer at once.
"""

__version__ = "0.1.0"
