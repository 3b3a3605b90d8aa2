"""What chat_sft alone uses; it shares the rest of utils/ with the lessons and predict."""

from utils.chat import checkpoints as checkpoints
from utils.chat import data as data
from utils.chat import kernels as kernels
from utils.chat import resuming as resuming
from utils.chat import run_log as run_log
from utils.chat import settings as settings
from utils.chat import signals as signals
from utils.chat import token_loss as token_loss
