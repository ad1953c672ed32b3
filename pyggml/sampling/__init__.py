"""From logits to the next token: plain functions over candidates, chained in llama.cpp's order and with its names and defaults.

`SAMPLERS` holds the steps by name, `SamplingParams` what they are set to, and `Sampler` what outlives a token: the random numbers, the
recent tokens and mirostat's running surprise.
"""

from pyggml.sampling.candidates import Candidates as Candidates
from pyggml.sampling.choose import draw as draw
from pyggml.sampling.choose import draw_beside as draw_beside
from pyggml.sampling.choose import probability as probability
from pyggml.sampling.choose import top_logprobs as top_logprobs
from pyggml.sampling.params import RANDOM_SEED as RANDOM_SEED
from pyggml.sampling.params import SAMPLERS as SAMPLERS
from pyggml.sampling.params import SamplingParams as SamplingParams
from pyggml.sampling.sampler import Sampler as Sampler
