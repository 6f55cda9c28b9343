"""What the server of `forked.py` imports once, before it forks."""

# ruff: noqa: F401
import transformers.distributed.configuration_utils
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import swat_lm.data
import swat_lm.evaluate.length
import swat_lm.papers.demo.run
import swat_lm.papers.reproduction
import swat_lm.serve.http.app
import swat_lm.serve.http.server
import swat_lm.train
from swat_lm import SwatForCausalLM
