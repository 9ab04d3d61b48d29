"""Decoders that cannot be attributed, with the reason and the missing extension.

Only the message depends on this list. A model that is not on it is refused too, if its blocks or
its logits turn out not to be linear in the stream.
"""

from dla_hooks.residual.architecture import Architecture, Refusal

ARCHITECTURES: tuple[Architecture, ...] = ()

REFUSALS = (
    Refusal(
        model_types=(
            "bart",
            "bert",
            "bert-generation",
            "big_bird",
            "blenderbot-small",
            "camembert",
            "data2vec-text",
            "electra",
            "ernie",
            "fsmt",
            "git",
            "led",
            "marian",
            "mvp",
            "openai-gpt",
            "plbart",
            "prophetnet",
            "rembert",
            "roberta",
            "roc_bert",
            "roformer",
            "speecht5",
            "trocr",
            "xlm",
            "xlm-roberta",
            "xlnet",
            "xmod",
        ),
        place="every block",
        reason="each block norms the sum itself, LayerNorm(x + f(x)), so that earlier writes are "
        "rescaled by a number that depends on later ones",
        needed="an attribution through a chain of frozen norms, which is another quantity",
    ),
    Refusal(
        model_types=("dory", "minimax"),
        place="every block",
        reason="the residual is taken after the norm, so that each block rescales the stream",
        needed="an attribution through a chain of frozen norms, which is another quantity",
    ),
    Refusal(
        model_types=(
            "deepseek_v4",
            "gemma3n",
            "gemma3n_text",
            "hy_v4",
            "qwen4_exp",
            "qwen4_exp_text",
        ),
        place="between the blocks",
        reason="several residual streams are mixed by gates that depend on the tokens",
        needed="directions that are carried back through those gates, position by position",
    ),
    Refusal(
        model_types=("inkling2_loop_text", "inkling2_text"),
        place="between the blocks",
        reason="what a block reads is a softmax over the outputs of all earlier ones",
        needed="directions that are carried back through that softmax, position by position",
    ),
    Refusal(
        model_types=("hrm_text",),
        place="the stack",
        reason="two stacks call each other in a loop, with a norm on the sum at each turn",
        needed="an attribution through a chain of frozen norms, which is another quantity",
    ),
    Refusal(
        model_types=("blip-2", "instructblip", "instructblipvideo"),
        place="the forward",
        reason="it does not run without an image, so that it cannot be measured on made-up tokens",
        needed="an image; or pass its language model alone (model.language_model), and what it is "
        "given as inputs_embeds",
    ),
    Refusal(
        model_types=("idefics", "kosmos-2"),
        place="the forward",
        reason="it does not run without an image, so that it cannot be measured on made-up tokens",
        needed="an image, and a declaration of the blocks that read it",
    ),
    Refusal(
        model_types=("diffusion_gemma",),
        place="the logits",
        reason="it fills in a whole block of tokens over several steps, each of which is given the "
        "logits of the last one",
        needed="a choice of the step, and the logits that it is given",
    ),
    Refusal(
        model_types=("pi0",),
        place="the head",
        reason="it puts out the actions of a robot, and no logits of tokens",
        needed="a language model; its own can be attributed by itself",
    ),
    Refusal(
        model_types=("blip",),
        place="every block",
        reason="each block of its text decoder norms the sum itself, LayerNorm(x + f(x))",
        needed="an attribution through a chain of frozen norms, which is another quantity",
    ),
    Refusal(
        model_types=("reformer",),
        place="the stack",
        reason="its layers are reversible: two streams that are joined at the end",
        needed="taps that survive its recomputation of activations",
    ),
    Refusal(
        model_types=(
            "megatron-bert",
            "modernbert",
            "modernbert-decoder",
            "roberta-prelayernorm",
            "xlm-roberta-xl",
        ),
        place="the LM head",
        reason="a dense layer, an activation and a norm stand between the final norm and the "
        "unembedding, so that no logit is an affine map of the stream",
        needed="an attribution to that head's own input",
    ),
    Refusal(
        model_types=("albert", "deberta", "deberta-v2", "nomic_bert"),
        place="the MLM head",
        reason="a dense layer, an activation and a norm stand between the last block and the "
        "unembedding, and each block norms the sum itself",
        needed="an attribution to that head's own input, through a chain of frozen norms",
    ),
    Refusal(
        model_types=("musicgen", "musicgen_decoder", "musicgen_melody", "musicgen_melody_decoder"),
        place="the LM head",
        reason="it has one head for every codebook of its audio, and no single logit of a token",
        needed="a choice of the codebook",
    ),
)
