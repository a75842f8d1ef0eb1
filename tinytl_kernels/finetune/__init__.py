"""Fine-tuning from the command line and from Python: data, recipe, loop, checkpoints, comparison of methods."""

from .compare import Comparison, Run, Summary, compare
from .data import Data, PictureDataset, load_data
from .distributed import Process, choose_device, process_group
from .figures import draw, plot_accuracy
from .loop import Options, Result, Training
from .prepare import METHODS, prepare
from .profile import Pair, Profile, profile
from .recipe import Recipe
from .signals import Interrupted

__all__ = [
    "METHODS",
    "Comparison",
    "Data",
    "Interrupted",
    "Options",
    "Pair",
    "PictureDataset",
    "Process",
    "Profile",
    "Recipe",
    "Result",
    "Run",
    "Summary",
    "Training",
    "choose_device",
    "compare",
    "draw",
    "load_data",
    "plot_accuracy",
    "prepare",
    "process_group",
    "profile",
]
