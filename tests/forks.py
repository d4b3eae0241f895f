"""For test_mutations.py: a forked pytest per input line [folder, test]; out come [exit status, output]."""

import json
import os
import sys
import tempfile

import pytest
import torch
import transformers  # noqa: F401
import transformers.models.auto.modeling_auto  # noqa: F401
import transformers.models.gpt2.modeling_gpt2  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401
from transformers import Trainer  # noqa: F401

torch.set_num_threads(1)
for line in sys.stdin:
    folder, test = json.loads(line)
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        child = os.fork()
        if not child:
            os.chdir(folder)
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            sys.path.insert(0, folder)  # kn and conftest have not been imported yet
            status = pytest.main(["-q", "-x", "-p", "no:cacheprovider", f"tests/{test}"])
            sys.stdout.flush()
            os._exit(int(status))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        output.seek(0)
        print(json.dumps([status, output.read()]), flush=True)
