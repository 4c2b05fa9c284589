"""A trunk with one output: a reward model, or PPO's value model."""

from torch import nn

from r1pipe.model.hf import HFModel
from r1pipe.model.transformer import DeepseekV3


class ScalarModel(nn.Module):
    """A trunk with a linear head of one output: a reward model, or PPO's value model.

    The names are those of transformers' sequence classification (model.*, score.*).
    """

    def __init__(self, language_model: DeepseekV3 | HFModel):
        """Takes the language model's trunk. The head starts at zero: every text scores the same."""
        super().__init__()
        language_model.drop_mtp()
        self.config = language_model.config
        self.model = language_model.model
        self.score = nn.Linear(self.config.hidden_size, 1)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)
