"""A trunk that gives one number: what reward models and PPO's value model are."""

from torch import nn

from r1pipe.model.transformer import DeepseekV3


class ScalarModel(nn.Module):
    """A trunk and a linear head, under transformers' names for sequence classification (model.*, score.*)."""

    def __init__(self, language_model: DeepseekV3):
        """Takes over the language model's trunk. The head starts at zero: every text scores the same."""
        super().__init__()
        language_model.drop_mtp()
        self.config = language_model.config
        self.model = language_model.model
        self.score = nn.Linear(self.config.hidden_size, 1)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)
