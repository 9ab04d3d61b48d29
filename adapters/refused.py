"""Decoders that cannot be attributed, with the reason and the missing extension.

Only the message depends on this list. A model that is not on it is refused too, if its blocks or
its logits turn out not to be linear in the stream.
"""

from dla_hooks.residual.architecture import Architecture, Refusal

ARCHITECTURES: tuple[Architecture, ...] = ()

REFUSALS = (
    Refusal(
        model_types=(
            "albert",
            "bart",
            "bert",
            "bert-generation",
            "big_bird",
            "blenderbot-small",
            "bros",
            "camembert",
            "canine",
            "convbert",
            "data2vec-text",
            "deberta",
            "deberta-v2",
            "distilbert",
            "electra",
            "ernie",
            "flaubert",
            "florence2",
            "fnet",
            "fsmt",
            "funnel",
            "fsmt",
            "git",
            "gte",
            "ibert",
            "jina_embeddings_v3",
            "layoutlm",
            "layoutlmv2",
            "layoutlmv3",
            "led",
            "lilt",
            "longformer",
            "luke",
            "lxmert",
            "marian",
            "markuplm",
            "mpnet",
            "mra",
            "mvp",
            "nomic_bert",
            "nystromformer",
            "openai-gpt",
            "plbart",
            "prophetnet",
            "rembert",
            "roberta",
            "roc_bert",
            "roformer",
            "speecht5",
            "splinter",
            "squeezebert",
            "tapas",
            "trocr",
            "xlm",
            "xlm-roberta",
            "xlnet",
            "xmod",
            "yoso",
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
            "glm5_next",
            "hy_v4",
            "qwen4_exp",
            "qwen4_exp_text",
        ),
        place="between the blocks",
        reason="several residual streams are mixed by gates that depend on the tokens",
        needed="directions that are carried back through those gates, position by position",
    ),
    Refusal(
        model_types=("inkling2", "inkling2_loop_text", "inkling2_text"),
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
        model_types=("voxtral_realtime",),
        place="the forward",
        reason="it adds a sound to every token and does not run without one, so that it cannot be "
        "measured on made-up tokens",
        needed="a sound",
    ),
    Refusal(
        model_types=("idefics",),
        place="the forward",
        reason="it does not run without an image, so that it cannot be measured on made-up tokens",
        needed="an image, and a declaration of the blocks that read it",
    ),
    Refusal(
        model_types=("kyutai_speech_to_text",),
        place="the prompt",
        reason="each of its positions holds a token of text and one of every codebook of its "
        "audio, ids [batch, pos, 1 + n_codebooks], and a prompt of one token a position is none",
        needed="prompts of several tokens a position",
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
            "esm",
            "esmc",
            "megatron-bert",
            "roberta-prelayernorm",
            "xlm-roberta-xl",
        ),
        place="the LM head",
        reason="a dense layer, an activation and a norm stand between the final norm and the "
        "unembedding, so that no logit is an affine map of the stream",
        needed="an attribution to that head's own input",
        doors=("causal", "masked"),
    ),
    Refusal(
        model_types=("modernbert", "modernbert-decoder", "modernvbert"),
        place="the head",
        reason="a dense layer, an activation and a norm stand between the final norm and the "
        "unembedding or the classifier, so that no logit is an affine map of the stream",
        needed="an attribution to that head's own input",
    ),
    Refusal(
        model_types=(
            "esm",
            "esmc",
            "eurobert",
            "megatron-bert",
            "roberta-prelayernorm",
            "xlm-roberta-xl",
        ),
        place="the classifier",
        reason="a dense layer and an activation stand between the final norm and the labels, so "
        "that no label's logit is an affine map of the stream",
        needed="an attribution to that head's own input",
        doors=("classification",),
    ),
    Refusal(
        model_types=("ultrabert", "ultravbert"),
        place="the LM head",
        reason="two dense layers with an activation behind each stand between the final norm and "
        "the unembedding, so that no logit is an affine map of the stream",
        needed="an attribution to that head's own input",
        doors=("masked",),
    ),
    Refusal(
        model_types=("ultrabert", "ultravbert"),
        place="the classifier",
        reason="it reads the first position or the mean of all, and not the last token",
        needed="a reading point of its own",
        doors=("classification",),
    ),
    Refusal(
        model_types=("mobilebert",),
        place="every block",
        reason="each block multiplies the sum itself, channel by channel, or norms it, and nothing "
        "stands between the last one and the head",
        needed="a declaration without a final norm",
    ),
    Refusal(
        model_types=("neomme",),
        place="the LM head",
        reason="the rank of its unembedding is raised by a map that is used transposed, outside "
        "of any module",
        needed="a declaration of that map",
    ),
    Refusal(
        model_types=("bigbird_pegasus", "mbart", "mt5", "t5", "umt5"),
        place="the classifier",
        reason="a dense layer and an activation stand between the stream at the end of the text "
        "and the labels, so that no label's logit is an affine map of the stream",
        needed="an attribution to that head's own input",
        doors=("classification",),
    ),
    Refusal(
        model_types=("bigbird_pegasus", "mbart", "mt5", "t5", "umt5"),
        place="the decoder",
        reason="the model makes its tokens itself, of the text that its encoder reads",
        needed="positions in tokens that the caller does not give",
        doors=("question-answering",),
    ),
    Refusal(
        model_types=("t5gemma", "t5gemma2"),
        place="the decoder",
        reason="the model makes its tokens itself, of the text that its encoder reads",
        needed="positions in tokens that the caller does not give",
        doors=("classification", "token-classification"),
    ),
    Refusal(
        model_types=("mt5", "t5", "umt5"),
        place="the stack",
        reason="labels are scored on the encoder alone, and only its decoder is declared",
        needed="a declaration of the encoder",
        doors=("token-classification",),
    ),
    Refusal(
        model_types=("perceiver",),
        place="the stack",
        reason="its blocks write to a set of latents, and not to a stream of the tokens",
        needed="an attribution through the cross-attention that reads the latents out",
    ),
    Refusal(
        model_types=("musicgen", "musicgen_decoder", "musicgen_melody", "musicgen_melody_decoder"),
        place="the LM head",
        reason="it has one head for every codebook of its audio, and no single logit of a token",
        needed="a choice of the codebook",
    ),
)
