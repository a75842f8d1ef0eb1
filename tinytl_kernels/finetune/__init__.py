"""Fine-tuning from the command line and from Python: data, recipe, loop, checkpoints, comparison of methods."""

from .adam8bit import Adam8bit
from .compare import Comparison, Run, Summary, compare
from .data import Data, PictureDataset, load_data
from .distributed import Process, choose_device, process_group
from .figures import draw, plot_accuracy
from .in_backward import step_in_backward
from .loop import Options, Result, Training
from .prepare import METHODS, prepare
from .profile import Pair, Profile, profile
from .recipe import OPTIMIZERS, Recipe
from .signals import Interrupted
from .tune import Tuned, tune

__all__ = [
    "METHODS",
    "OPTIMIZERS",
    "Adam8bit",
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
    "Tuned",
    "choose_device",
    "compare",
    "draw",
    "load_data",
    "plot_accuracy",
    "prepare",
    "process_group",
    "profile",
    "step_in_backward",
    "tune",
]
