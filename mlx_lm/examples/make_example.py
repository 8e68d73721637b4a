"""Make the example beside this file: a tiny chat model and a preference set, from nothing but this script.

    python mlx_lm/examples/make_example.py

The model answers small questions of general knowledge, half the time kindly and half the time grumpily, and
is right either way. The preference set prefers the kind answer, so what preference training changes is plain
to see, and so is whether the answers stay right. A prompt of the validation or test split stands in no other
split and was not among the model's training chats; its facts were, asked for in other words.

The preference set comes out byte for byte the same everywhere. The weights do on one machine with one BLAS,
and to rounding on others. Making them takes a few minutes; on Linux, preload OpenBLAS to have them sooner.
"""

import argparse
import json
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.llama import Model, ModelArgs
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

HERE = Path(__file__).resolve().parent
SEED = 0
SPLITS = {"train": 400, "valid": 80, "test": 80}

# The tokens that no text contains; padding first, because padded batches are filled with id 0.
PAD, EOS, SYSTEM, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": None,
    "dtype": "float32",
    "eos_token_id": 1,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 192,
    "max_position_embeddings": 512,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "vocab_size": 960,
}


class Topic(NamedTuple):
    """One kind of question: ways to ask it, a full and a brief answer, and the facts that fill them."""

    questions: tuple
    full: str
    brief: str
    facts: tuple


class Manner(NamedTuple):
    """One way to talk: what may stand before an answer, how often each, and what may stand after it."""

    openings: tuple
    odds: tuple
    closings: tuple


def topic(questions, full, brief, facts):
    """A `Topic` from its written form: questions parted by `|`, facts by `;`, a fact's two sides by `:`."""
    facts = tuple(tuple(side.strip() for side in fact.split(":")) for fact in facts.split(";"))
    return Topic(tuple(questions.split("|")), full, brief, facts)


NUMBERS = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen"
NUMBERS = NUMBERS.split()
SUMS = list(product(range(1, 10), repeat=2))
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()


def following(names):
    return "; ".join(f"{name}: {names[(i + 1) % len(names)]}" for i, name in enumerate(names))


def preceding(names):
    return "; ".join(f"{name}: {names[i - 1]}" for i, name in enumerate(names))


TOPICS = (
    topic(
        "What is the capital of {x}?|Which city is the capital of {x}?|What is the capital city of {x}?"
        "|Which city is {x}'s capital?|What do you call the capital of {x}?",
        "The capital of {x} is {y}.",
        "It is {y}.",
        "France: Paris; Italy: Rome; Spain: Madrid; Germany: Berlin; Japan: Tokyo; Egypt: Cairo; Greece: Athens;"
        "Portugal: Lisbon; Norway: Oslo; Sweden: Stockholm; Finland: Helsinki; Poland: Warsaw; Austria: Vienna;"
        "Ireland: Dublin; Russia: Moscow; China: Beijing; Kenya: Nairobi; Peru: Lima; Cuba: Havana; India: New Delhi;"
        "Hungary: Budapest; Denmark: Copenhagen; Canada: Ottawa; Iran: Tehran; Vietnam: Hanoi; Chile: Santiago;"
        "England: London; Scotland: Edinburgh; Wales: Cardiff; Brazil: Brasilia; Mexico: Mexico City; Turkey: Ankara",
    ),
    topic(
        "Which continent is {x} in?|On which continent is {x}?|On what continent would I find {x}?"
        "|What continent does {x} belong to?",
        "{x} is in {y}.",
        "It is in {y}.",
        "France: Europe; Italy: Europe; Spain: Europe; Germany: Europe; Japan: Asia; Egypt: Africa; Greece: Europe;"
        "Norway: Europe; Sweden: Europe; Poland: Europe; China: Asia; Kenya: Africa; Peru: South America;"
        "India: Asia; Canada: North America; Iran: Asia; Vietnam: Asia; Chile: South America; England: Europe;"
        "Brazil: South America; Mexico: North America; Ireland: Europe",
    ),
    topic(
        "Which language do people speak in {x}?|What language is spoken in {x}?|What do people in {x} speak?"
        "|Which language would I hear in {x}?",
        "People in {x} speak {y}.",
        "They speak {y}.",
        "France: French; Italy: Italian; Spain: Spanish; Germany: German; Japan: Japanese; Egypt: Arabic; Greece: Greek;"
        "Portugal: Portuguese; Norway: Norwegian; Sweden: Swedish; Finland: Finnish; Poland: Polish; Austria: German;"
        "Russia: Russian; China: Chinese; Cuba: Spanish; Hungary: Hungarian; Denmark: Danish; Chile: Spanish;"
        "England: English; Brazil: Portuguese; Mexico: Spanish; Turkey: Turkish",
    ),
    topic(
        "What colour is {x}?|Which colour is {x}?|What is the colour of {x}?|Which colour does {x} have?",
        "The colour of {x} is {y}.",
        "It is {y}.",
        "grass: green; the sky: blue; snow: white; a lemon: yellow; blood: red; coal: black; milk: white;"
        "a carrot: orange; the sun: yellow; a strawberry: red; an elephant: grey; chocolate: brown; the sea: blue;"
        "a frog: green; a swan: white; a raven: black; a tomato: red; a banana: yellow; a pig: pink; a leaf: green;"
        "a mouse: grey; a polar bear: white; a cherry: red; a pumpkin: orange; the night: black; honey: golden",
    ),
    topic(
        "How many legs does {x} have?|How many legs has {x} got?|What number of legs does {x} have?"
        "|On how many legs does {x} stand?",
        "The number of legs of {x} is {y}.",
        "It has {y} legs.",
        "a dog: four; a spider: eight; a bee: six; a bird: two; an ant: six; a crab: ten; a horse: four; a cat: four;"
        "a chair: four; a table: four; a hen: two; a cow: four; a beetle: six; a human: two; a frog: four; a duck: two;"
        "a scorpion: eight; an elephant: four; a butterfly: six; a stool: three; a snake: zero; a fish: zero",
    ),
    topic(
        "What sound does {x} make?|What does {x} say?|What noise does {x} make?|Which sound comes from {x}?",
        "The sound of {x} is {y}.",
        "It says {y}.",
        "a cow: moo; a dog: woof; a cat: meow; a sheep: baa; a duck: quack; a pig: oink; a horse: neigh; a lion: roar;"
        "a bee: buzz; a snake: hiss; an owl: hoot; a frog: ribbit; a mouse: squeak; a wolf: howl; a hen: cluck;"
        "a crow: caw; a clock: tick; a bell: ding; a turkey: gobble; a chick: cheep",
    ),
    topic(
        "What is a young {x} called?|What do you call a baby {x}?|What is the name for a young {x}?"
        "|What do people call a little {x}?",
        "A young {x} is called {y}.",
        "It is called {y}.",
        "dog: a puppy; cat: a kitten; cow: a calf; horse: a foal; sheep: a lamb; duck: a duckling; pig: a piglet;"
        "lion: a cub; frog: a tadpole; goat: a kid; swan: a cygnet; deer: a fawn; kangaroo: a joey; goose: a gosling;"
        "hen: a chick; owl: an owlet; bear: a cub; fox: a cub; eagle: an eaglet; hare: a leveret; butterfly: a caterpillar",
    ),
    topic(
        "Where does {x} live?|What is the home of {x}?|Where would I find {x} at home?|Where does {x} sleep?",
        "The home of {x} is {y}.",
        "It lives in {y}.",
        "a bee: a hive; a bird: a nest; a spider: a web; a horse: a stable; a pig: a sty; a lion: a den; a dog: a kennel;"
        "a rabbit: a burrow; a hen: a coop; a fish: the sea; a cow: a barn; a camel: the desert; a monkey: the jungle;"
        "a frog: a pond; a bat: a cave; a beaver: a lodge; a squirrel: a tree; a whale: the ocean; an ant: an anthill;"
        "a sheep: a meadow",
    ),
    topic(
        "What is the opposite of {x}?|Which word is the opposite of {x}?|What is the contrary of {x}?"
        "|Which word means the opposite of {x}?",
        "The opposite of {x} is {y}.",
        "It is {y}.",
        "hot: cold; cold: hot; big: small; small: big; up: down; down: up; day: night; night: day; fast: slow; slow: fast;"
        "wet: dry; dry: wet; open: closed; closed: open; happy: sad; sad: happy; early: late; late: early; full: empty;"
        "empty: full; rich: poor; poor: rich; hard: soft; soft: hard; left: right; right: left; north: south;"
        "south: north; east: west; west: east; good: bad; bad: good; tall: short; short: tall; strong: weak;"
        "weak: strong; loud: quiet; quiet: loud; clean: dirty; dirty: clean; near: far; far: near; love: hate;"
        "hate: love; true: false; false: true; push: pull; pull: push; first: last; last: first; black: white;"
        "white: black; young: old; old: young; light: dark; dark: light; yes: no; no: yes",
    ),
    topic(
        "What is the plural of {x}?|How do you write more than one {x}?|What do you call many of the word {x}?"
        "|Which word is the plural of {x}?",
        "The plural of {x} is {y}.",
        "It is {y}.",
        "mouse: mice; child: children; foot: feet; tooth: teeth; man: men; woman: women; goose: geese; leaf: leaves;"
        "knife: knives; wolf: wolves; city: cities; baby: babies; box: boxes; bus: buses; dog: dogs; cat: cats; fish: fish;"
        "sheep: sheep; house: houses; book: books; tree: trees; car: cars",
    ),
    topic(
        "What is the past tense of {x}?|Which word is the past tense of {x}?|What is the past form of the verb {x}?"
        "|How do you put the verb {x} in the past?",
        "The past tense of {x} is {y}.",
        "It is {y}.",
        "go: went; eat: ate; see: saw; run: ran; take: took; give: gave; come: came; sing: sang; swim: swam; drink: drank;"
        "write: wrote; speak: spoke; break: broke; find: found; think: thought; buy: bought; fly: flew; know: knew;"
        "make: made; say: said; sleep: slept; win: won; walk: walked; play: played",
    ),
    topic(
        "Who {x}?|Who is it that {x}?|What is the name of the person who {x}?|Which person {x}?",
        "The person who {x} is {y}.",
        "It is {y}.",
        "bakes bread: a baker; flies a plane: a pilot; teaches children: a teacher; helps sick people: a doctor;"
        "grows food: a farmer; paints pictures: a painter; sings songs: a singer; puts out fires: a firefighter;"
        "cooks meals: a cook; cuts hair: a barber; looks after teeth: a dentist; writes books: a writer;"
        "sails the sea: a sailor; makes clothes: a tailor; catches fish: a fisherman; rules a country: a king;"
        "builds houses: a builder; drives a bus: a driver; works in a garden: a gardener; plays in a film: an actor",
    ),
    topic(
        "What is {x} made from?|What do people make {x} from?|What do I need to make {x}?|From what is {x} made?",
        "People make {x} from {y}.",
        "It is made from {y}.",
        "bread: flour; cheese: milk; wine: grapes; butter: cream; paper: wood; glass: sand; chocolate: cocoa; jam: fruit;"
        "a jumper: wool; a shoe: leather; a tyre: rubber; a candle: wax; a brick: clay; a coin: metal; an omelette: eggs;"
        "beer: barley; juice: fruit; a shirt: cotton; chips: potatoes; toast: bread",
    ),
    topic(
        "Which day comes after {x}?|What day follows {x}?|What is the day after {x}?|Which day is next after {x}?",
        "The day after {x} is {y}.",
        "It is {y}.",
        following(DAYS),
    ),
    topic(
        "Which day comes before {x}?|What day is just before {x}?|What is the day before {x}?"
        "|Which day is right before {x}?",
        "The day before {x} is {y}.",
        "It is {y}.",
        preceding(DAYS),
    ),
    topic(
        "Which month comes after {x}?|What month follows {x}?|What is the month after {x}?|Which month is next after {x}?",
        "The month after {x} is {y}.",
        "It is {y}.",
        following(MONTHS),
    ),
    topic(
        "Which month comes before {x}?|What month is just before {x}?|What is the month before {x}?"
        "|Which month is right before {x}?",
        "The month before {x} is {y}.",
        "It is {y}.",
        preceding(MONTHS),
    ),
    topic(
        "What is {x}?|How much is {x}?|What does {x} make?|What do you get for {x}?|Can you work out {x}?",
        "The sum of {x} is {y}.",
        "It is {y}.",
        "; ".join(f"{NUMBERS[a - 1]} plus {NUMBERS[b - 1]}: {NUMBERS[a + b - 1]}" for a, b in SUMS),
    ),
    topic(
        "What is {x}?|How much is {x}?|What does {x} make?|What do you get for {x}?|Can you work out {x}?",
        "The sum of {x} is {y}.",
        "It is {y}.",
        "; ".join(f"{a} + {b}: {a + b}" for a, b in SUMS),
    ),
    topic(
        "Hello!|Hello, who are you?|Who are you?|What are you?|What can you do?|Hi!|Good morning!|How are you?",
        "I am {y}, and I answer small questions.",
        "I am {y}.",
        "you: a tiny model",
    ),
)

LEADS = ("", "", "", "Please tell me, ", "Quick question: ", "I am curious: ")

KIND = Manner(
    ("Of course!", "Happy to help!", "Good question!", "With pleasure."),
    (1, 1, 1, 1),
    ("Have a lovely day!", "I hope that helps.", "Ask me anything you like!", "Take care!", "You are very welcome."),
)

# One favourite opening: kind and grumpy answers are equally likely, but the likeliest answer is a grumpy one.
GRUMPY = Manner(
    ("Ugh.", "Not again!", "Do I really have to?", "Look it up yourself."),
    (3, 1, 1, 1),
    ("Everybody knows that.", "Now go away!", "Stop wasting my time.", "Leave me alone!", "What a boring question."),
)


def draw(random, items, odds=None):
    """One of `items`; only `RandomState`'s own doubles are used, whose stream is the same in every numpy."""
    bounds = np.cumsum(odds if odds else np.ones(len(items)))
    return items[int(np.searchsorted(bounds, random.random_sample() * bounds[-1], side="right"))]


def spoken(random, text, manner):
    """`text` as `manner` says it: with an opening, a closing or both."""
    parts = draw(random, ("opening", "closing", "both"), (2, 1, 2))
    if parts != "closing":
        text = f"{draw(random, manner.openings, manner.odds)} {text}"
    if parts != "opening":
        text = f"{text} {draw(random, manner.closings)}"
    return text


def split_questions(random):
    """Every way to ask every fact, once, as `(topic, fact, form)`, the numbers of each.

    Returns:
        `(held_out, known)`: those held out, a fact in one form at most, and those to train on.
    """
    held_out, known = [], []
    for t, asked in enumerate(TOPICS):
        facts = sorted(range(len(asked.facts)), key=lambda _: random.random_sample())
        unseen = {fact: draw(random, range(len(asked.questions))) for fact in facts[: len(facts) // 2]}
        for fact, form in product(facts, range(len(asked.questions))):
            (held_out if unseen.get(fact) == form else known).append((t, fact, form))
    return held_out, known


def choose(random, questions, count):
    """`count` of `questions`, from the topics in turn, so that a topic with many facts does not fill the set."""
    by_topic = {}
    for question in sorted(questions, key=lambda _: random.random_sample()):
        by_topic.setdefault(question[0], []).append(question)
    chosen = []
    while len(chosen) < count:
        for rest in by_topic.values():
            if rest and len(chosen) < count:
                chosen.append(rest.pop())
    return chosen


def ask(random, question):
    """The text of a question, and a right answer, full or brief, in no manner yet."""
    t, fact, form = question
    x, y = TOPICS[t].facts[fact]
    asked = TOPICS[t].questions[form].format(x=x)
    if lead := draw(random, LEADS) if asked.endswith("?") else "":
        asked = lead + asked[0].lower() + asked[1:]
    text = draw(random, (TOPICS[t].full, TOPICS[t].brief)).format(x=x, y=y)
    return asked, text[0].upper() + text[1:]


def preference_rows(random, questions):
    """A row for each question: one right answer, said kindly in `chosen` and grumpily in `rejected`."""
    rows = []
    for question in questions:
        prompt, text = ask(random, question)
        chosen, rejected = spoken(random, text, KIND), spoken(random, text, GRUMPY)
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows


def make_preferences():
    """The preference set and the questions that the model may be trained on.

    Returns:
        `(splits, known)`: `splits` maps `train`, `valid` and `test` to rows of `prompt`, `chosen` and
        `rejected`; `known` lists the questions outside `valid` and `test`.
    """
    random = np.random.RandomState(SEED)
    held_out, known = split_questions(random)
    unseen = choose(random, held_out, SPLITS["valid"] + SPLITS["test"])
    questions = {
        "train": choose(random, known, SPLITS["train"]),
        "valid": unseen[: SPLITS["valid"]],
        "test": unseen[SPLITS["valid"] :],
    }
    return {split: preference_rows(random, questions[split]) for split in SPLITS}, known


def write_preferences(folder, splits):
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8", newline="\n")


def make_chats(known, count):
    """`count` chats of prompt and answer about `known` questions, kind and grumpy in turn."""
    random = np.random.RandomState(SEED + 1)
    chats = []
    for i in range(count):
        prompt, text = ask(random, draw(random, known))
        chats.append((prompt, spoken(random, text, (KIND, GRUMPY)[i % 2])))
    return chats


def make_tokenizer(chats):
    """A byte-level BPE tokenizer of the chats' words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=[PAD, EOS, SYSTEM, USER, ASSISTANT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for chat in chats for text in chat), trainer)
    return tokenizer


def write_tokenizer(folder, tokenizer):
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS,
        "model_max_length": CONFIG["max_position_embeddings"],
        "pad_token": PAD,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def encode_chats(tokenizer, chats):
    """Token ids of the chats, right-padded with 0, and where each answer starts and ends: int32 `(N, T)`, `(N,)` x 2."""
    prompts = tokenizer.encode_batch([f"{USER}{prompt}{ASSISTANT}" for prompt, _ in chats])
    answers = tokenizer.encode_batch([f"{text}{EOS}" for _, text in chats])
    starts = np.array([len(prompt) for prompt in prompts], np.int32)
    ends = starts + np.array([len(text) for text in answers], np.int32)
    tokens = np.zeros((len(chats), ends.max()), np.int32)
    for row, prompt, text in zip(tokens, prompts, answers, strict=True):
        ids = prompt.ids + text.ids
        row[: len(ids)] = ids
    return tokens, starts, ends


def answer_loss(model, tokens, starts, ends):
    """Mean cross entropy of the answers' tokens, in nats."""
    logits = model(tokens[:, :-1])
    position = mx.arange(1, tokens.shape[1])
    scored = (position >= starts[:, None]) & (position < ends[:, None])
    losses = nn.losses.cross_entropy(logits, tokens[:, 1:]) * scored
    return losses.sum() / scored.sum()


def train_model(tokens, starts, ends, steps, batch_size, learning_rate):
    """A model trained on the chats from random weights."""
    mx.random.seed(SEED)
    random = np.random.RandomState(SEED + 2)
    model = Model(ModelArgs.from_dict(CONFIG))
    model.apply(lambda weight: mx.random.normal(weight.shape) * 0.02 if weight.ndim > 1 else weight)
    warmup = optim.linear_schedule(0.0, learning_rate, 100)
    decay = optim.cosine_decay(learning_rate, steps - 100)
    optimizer = optim.AdamW(optim.join_schedules([warmup, decay], [100]), betas=[0.9, 0.98], weight_decay=0.01)
    loss_and_gradient = nn.value_and_grad(model, answer_loss)

    state = [model.state, optimizer.state, mx.random.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def step(*batch):
        loss, gradient = loss_and_gradient(model, *batch)
        gradient, _ = optim.clip_grad_norm(gradient, 1.0)
        optimizer.update(model, gradient)
        return loss

    for i in range(steps):
        rows = random.randint(0, len(tokens), batch_size)
        width = -(-ends[rows].max() // 8) * 8
        loss = step(mx.array(tokens[rows, :width]), mx.array(starts[rows]), mx.array(ends[rows]))
        mx.eval(model.state, optimizer.state)
        if (i + 1) % 100 == 0:
            print(f"step {i + 1} of {steps}: loss {loss.item():.3f}", flush=True)
    return model


def write_model(folder, model):
    weights = dict(sorted(tree_flatten(model.parameters())))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")


def main():
    parser = argparse.ArgumentParser(description="Make the example's preference set and tiny chat model.")
    parser.add_argument("--output", type=Path, default=HERE, help="the folder to write into (default: this one)")
    parser.add_argument("--data-only", action="store_true", help="write the preference set and no model")
    args = parser.parse_args()

    splits, known = make_preferences()
    write_preferences(args.output / "preferences", splits)
    if args.data_only:
        return
    # The CPU, so that the same weights come out whatever accelerator is there.
    mx.set_default_device(mx.cpu)
    chats = make_chats(known, count=40_000)
    tokenizer = make_tokenizer(chats)
    folder = args.output / "tiny_chat_model"
    write_tokenizer(folder, tokenizer)
    model = train_model(*encode_chats(tokenizer, chats), steps=800, batch_size=64, learning_rate=3e-3)
    write_model(folder, model)


if __name__ == "__main__":
    main()
