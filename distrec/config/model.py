"""Sections of the model: towers and heads, and what is minimised."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, model_validator

from distrec.config.section import Section

# bounds are far above what is used: a slip of the hand is told before memory is taken
Width = Annotated[int, Field(ge=1, le=65_536)]

BIAS = "bias"
"""The item's bias among the parts of a score, beside the towers."""

NegativesSource = Literal["popularity", "uniform", "in_batch", "mixed"]


class ModelConfig(Section):
    """The unified model: towers that share embeddings, weighed by a gate."""

    towers: tuple[Literal["cf", "autoencoder", "sequence", "deep", "content"], ...] = (
        "cf",
        "autoencoder",
        "deep",
    )
    """Which towers are on. content needs features of items."""
    frozen: tuple[Literal["cf", "autoencoder", "sequence", "deep", "content", "bias"], ...] = ()
    """Fine-tuning: towers that stay as train.warm_start gives them, with the rows of all tables
    that they read, shared or not. "bias": so does the items' bias. The gate, the biases of users
    and the other towers are trained."""
    adapter_rank: int = Field(default=0, ge=0, le=65_536)
    """Above 0: beside every linear map of a frozen tower one of so low a rank is trained (LoRA)."""
    embedding_dim: int = Field(default=64, ge=4, le=65_536, multiple_of=4)
    """D, the width of user, item and tower vectors."""
    feature_dim: int = Field(default=16, ge=4, le=65_536, multiple_of=4)
    """Width of the embeddings of features."""
    share_item_embedding: bool = True
    """One item table for the cf tower, the autoencoder's output and the sequence tower; else one
    each."""
    cf_history: Literal["none", "mean"] = "none"
    """mean: the cf tower adds to a user's row the mean of the item rows of the history, from its
    item table."""
    autoencoder_hidden: tuple[Width, ...] = (256,)
    """Widths of the hidden layers between the pooled history and the vector of the towers
    autoencoder and content."""
    autoencoder_kl: float = Field(default=0.0, ge=0)
    """Above 0: the autoencoder tower is a variational one (Mult-VAE), and this is the weight of its
    divergence from the standard normal distribution. It counts for each event that is predicted,
    where Mult-VAE counts it once for all of a user's: its 0.2 is 0.002 for users of 100 events."""
    autoencoder_kl_steps: int = Field(default=1000, ge=1)
    """Steps over which that weight rises from 0."""
    sequence_layers: int = Field(default=2, ge=1, le=1_000)
    """Blocks of the sequence tower's transformer."""
    sequence_heads: int = Field(default=2, ge=1)
    """Heads of its attention; they divide embedding_dim."""
    sequence_attention: Literal["softmax", "hstu"] = "softmax"
    """softmax: as in SASRec, with a hidden layer of four times the width. hstu: pointwise and
    gated, without a hidden layer."""
    sequence_mask: float = Field(default=0.0, ge=0, lt=1)
    """Share of the history's items that the sequence tower sees as the unknown one in training."""
    deep_hidden: tuple[Width, ...] = (128,)
    """Widths of the hidden layers of the deep tower, user and item side, and of content's items."""
    deep_crosses: int = Field(default=0, ge=0, le=1_000)
    """Cross layers (DCN-v2) over the features of each side, before the hidden layers of the deep
    tower."""
    pair_crosses: int = Field(default=0, ge=0, le=1_000)
    """binary and squared: cross layers over the vectors of user and item side by side, with an MLP
    of pair_hidden, whose output is added to the score of an example. Lists are ranked without."""
    pair_cross_rank: int = Field(default=0, ge=0, le=65_536)
    """Above 0: their maps are products of two matrices of so low a rank, far fewer numbers."""
    pair_hidden: tuple[Width, ...] | None = None
    """Widths of that MLP's hidden layers; deep_hidden if it is not set, one linear map if empty."""
    multi_task: Literal["none", "shared_bottom", "mmoe", "ple"] = "none"
    """binary: a head that predicts prepare.events.tasks beside the label, from the vectors of user
    and item and their product; what it makes of the label is added to the score of an example, and
    lists are ranked without. shared_bottom: one expert for all tasks. mmoe: several, weighed by a
    gate a task. ple: expert_layers of them, in which each task has experts of its own beside the
    shared ones."""
    experts: int = Field(default=4, ge=1, le=1_000)
    """mmoe: experts. ple: shared ones of a layer, and as many of each task."""
    expert_hidden: tuple[Width, ...] = Field(default=(64,), min_length=1)
    """multi_task: widths of the layers of an expert."""
    expert_layers: int = Field(default=2, ge=1, le=1_000)
    """ple: layers of experts, one on top of the other."""
    rating_levels: int = Field(default=0, ge=0, le=1_000)
    """loss.kind = "ordinal": how many ratings there are, evenly from the lowest to the highest: 5
    for whole stars from 1 to 5, 10 for half ones from 0.5. A rating between two counts as the
    nearer one."""
    gate_hidden: int = Field(default=16, ge=1, le=65_536)
    """Width of the hidden layer of the gate."""
    dropout: float = Field(default=0.2, ge=0, lt=1)
    """Of hidden layers."""
    input_dropout: float = Field(default=0.3, ge=0, lt=1)
    """Share of the history's items withheld from the autoencoder in training (denoising)."""
    id_dropout: float = Field(default=0.1, ge=0, lt=1)
    """Share of user ids and item ids replaced by the unknown id in training, so that the other
    towers learn to stand in for it; also of examples whose context, which scoring lacks, is
    withheld."""
    augment: tuple[Literal["crop", "reorder", "substitute"], ...] = ()
    """In training a history is changed in one of these ways, as likely each. crop: all but one
    stretch of it is cut off. reorder: the items of one stretch change places. substitute: one of
    the ten items nearest to it, by who had them in train, stands in for an item (up to 200,000
    items). input_dropout and sequence_mask, which withhold items, are apart from it."""
    augment_rate: float = Field(default=0.3, gt=0, lt=1)
    """Share of a history's events that is cut off, changes places or is substituted."""
    augment_share: float = Field(default=0.5, ge=0, le=1)
    """Share of the examples whose history is changed."""
    tower_weights: Mapping[str, Annotated[float, Field(ge=0)]] = {}
    """Tower, or "bias" for the item's bias -> what its part of a score is multiplied by outside
    training; 1 where it is not named. See train.fit_tower_weights. No effect on probabilities and
    ratings."""
    new_item_bias: float = 0.0
    """Added outside training to the score of an item without a row of its own, such as one that
    nobody has had yet: how much such items are taken at all, train cannot tell. See
    train.fit_tower_weights. No effect on probabilities and ratings."""
    recent_weight: float = 0.0
    """So often the logarithm of 3 + an item's events of the last prepare.recent_days is added to
    its score outside training: what sells now, which training, over all of the past, cannot tell.
    In scoring these are the last days of all events. See train.fit_tower_weights. No effect on
    probabilities and ratings."""
    normalize: bool = False
    """Tower vectors of length one (cosine), with `temperature`."""
    temperature: float = Field(default=1.0, gt=0)
    """The towers' part of a score is divided by it."""

    @model_validator(mode="after")
    def _towers(self) -> ModelConfig:
        if not self.towers or len(set(self.towers)) != len(self.towers):
            raise ValueError(
                f"towers names each tower once, and at least one. Received: {list(self.towers)}"
            )
        parts = {*self.towers, BIAS}
        if not set(self.frozen) <= parts or len(set(self.frozen)) != len(self.frozen):
            raise ValueError(
                f"frozen names some of the towers, each once, and {BIAS!r}. Received: "
                f"{list(self.frozen)} of {list(self.towers)}"
            )
        if not set(self.tower_weights) <= parts:
            raise ValueError(
                f"tower_weights names towers that are on, or {BIAS!r}. Received: "
                f"{list(self.tower_weights)} with {list(self.towers)}"
            )
        if self.rating_levels in (1, 2):
            raise ValueError(
                "ordered ratings are at least three. Received: rating_levels = "
                f"{self.rating_levels}. Set it to 0, or use labels and a binary loss for two"
            )
        if len(set(self.augment)) != len(self.augment):
            raise ValueError(f"augment names each change once. Received: {list(self.augment)}")
        if self.adapter_rank and not self.frozen:
            raise ValueError(
                "adapters stand beside what is frozen. Received: adapter_rank = "
                f"{self.adapter_rank}, no frozen towers. Name some, or set it to 0"
            )
        if "sequence" in self.towers and self.embedding_dim % self.sequence_heads:
            raise ValueError(
                "sequence_heads divides embedding_dim. Received: sequence_heads = "
                f"{self.sequence_heads}, embedding_dim = {self.embedding_dim}. Change either"
            )
        return self


class LossConfig(Section):
    """What is minimised."""

    kind: Literal[
        "auto",
        "softmax",
        "sampled_softmax",
        "sampled_binary",
        "bpr",
        "binary",
        "squared",
        "ordinal",
    ] = "auto"
    """softmax over the whole catalogue; sampled_softmax with logQ correction; sampled_binary
    cross-entropy of positives and sampled negatives; bpr: positives above sampled negatives; binary
    cross-entropy on label; squared difference from the rating; ordinal: likelihood of the
    rating among model.rating_levels ordered ones. auto: squared on ratings, binary
    when the data has labels, else softmax up to full_softmax_items items, else sampled_softmax."""
    full_softmax_items: int = Field(default=20_000, ge=1)
    """auto: largest catalogue for the full softmax."""
    negatives: NegativesSource = "popularity"
    """Of the sampled losses; all examples of a global batch share them. popularity: num_negatives
    draws in proportion to (count + 1) ** sampling_power; uniform: num_negatives even draws;
    in_batch: the targets of all examples; mixed: those and num_negatives even draws.
    sampled_softmax is corrected for what is drawn more often, the others are not."""
    num_negatives: int = Field(default=4096, ge=1, le=2**31 - 1)
    """Items drawn a step."""
    sampling_power: float = Field(default=0.75, ge=0, le=1)
    """popularity: items are drawn in proportion to (count + 1) ** sampling_power."""
    calibration: float = Field(default=0.75, ge=0, le=1)
    """sampled_binary: t of gSASRec. 0 is plain cross-entropy, which makes probabilities too high; 1
    gives those of training on all negatives."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """softmax: share of the target spread over the catalogue; binary: how far labels move towards
    one half."""
    task_weights: Mapping[str, Annotated[float, Field(ge=0)]] = {}
    """model.multi_task: task -> weight of its mean loss, "label" the first; 1 for the others. A
    mean is over the rows of the global batch whose label of the task is known."""
    towers: float = Field(default=0.0, ge=0)
    """Weight of each tower's own loss: of scores by the inner product of its vectors, before the
    gate, and the item's bias. A tower that explains train by heart then stops no other from
    learning. For losses over the catalogue, of 2 towers or more; each is one more pass over the
    same candidates."""
    exclude_seen: bool | None = None
    """Whether what an example's history holds is left out of its candidates, as lists leave it out:
    the model need not learn that nothing is taken twice, and what was taken earlier says nothing
    against it. The item to predict stays. What is older than prepare.history_length is a candidate,
    so that should hold most histories. For losses over the catalogue. Not given: where
    evaluate.exclude_seen does so, and prepare.duplicates leaves one event of a user with an item;
    not with [privacy]."""
    contrastive: float = Field(default=0.0, ge=0)
    """Weight of a term that holds each user's history, seen in two ways, to be more like itself
    than like those of the other users of a rank's part of the batch (InfoNCE), by the towers that
    read histories: autoencoder, sequence and content; without one of them there is no such term.
    The two ways: model.augment, and what the towers drop out."""
    contrastive_temperature: float = Field(default=0.2, gt=0)
    """Cosines of histories are divided by it."""
    adversarial: float = Field(default=0.0, ge=0)
    """Above 0: the loss is also that of each example with its rows of the user side moved by so
    much, in all, to where its loss grows fastest (FGM); a step takes up to twice as long."""
    l2: float = Field(default=1e-5, ge=0)
    """Weight of the squared norm of the embeddings that an example uses."""
    table_l2: Mapping[str, Annotated[float, Field(ge=0)]] = {}
    """Embedding table -> its weight in place of `l2`. Tables are those that `distrec plan` prints:
    user, item, item_history, item_bias, user_bias, the column of a feature of ids; a table that
    these towers do not read is no error. The dense part has train.weight_decay."""
