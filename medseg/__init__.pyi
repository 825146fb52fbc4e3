# The public names of medseg. This is the only list: the package, `help(medseg)` and type checkers read it.
from medseg.diagnosis.api import doctor as doctor
from medseg.io.readers import load as load
from medseg.jobs.api import evaluate as evaluate
from medseg.jobs.api import predict as predict
from medseg.jobs.api import train as train
from medseg.jobs.predictor import Predictor as Predictor
from medseg.planning.api import plan as plan
from medseg.scoring.comparison import compare as compare
from medseg.tools.convert import convert as convert
from medseg.tools.export import export as export
from medseg.tools.prune import prune as prune
from medseg.version import __version__ as __version__

from . import errors as errors
