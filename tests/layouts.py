"""A row of each layout that is read as it is."""

USER = {"role": "user", "content": "Name a planet."}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("Mars.", "No."))

# Layout: a row of it, which says that "Mars." is better than "No.".
LAYOUTS = {
    "prompt, chosen, rejected": {"prompt": "Name a planet.", "chosen": "Mars.", "rejected": "No."},
    "UltraFeedback, binarized": {
        "prompt": "Name a planet.",
        "prompt_id": "f0e37e",
        "chosen": [USER, GOOD],
        "rejected": [USER, BAD],
        "messages": [USER, GOOD],
        "score_chosen": 8.5,
        "score_rejected": 3.0,
    },
    "Anthropic HH-RLHF": {
        "chosen": "\n\nHuman: Name a planet.\n\nAssistant: Mars.",
        "rejected": "\n\nHuman: Name a planet.\n\nAssistant: No.",
    },
    "Orca DPO pairs": {"system": "", "question": "Name a planet.", "chosen": "Mars.", "rejected": "No."},
    "Argilla mixes": {
        "source": "evol_instruct",
        "chosen": [USER, GOOD],
        "chosen-rating": 5.0,
        "chosen-model": "a",
        "rejected": [USER, BAD],
        "rejected-rating": 2.5,
        "rejected-model": "b",
    },
    "Argilla distilabel": {
        "input": "Name a planet.",
        "chosen": "Mars.",
        "rejected": "No.",
        "generations": ["Mars.", "No."],
    },
    "Capybara": {
        "conversation": [{"input": "Name a planet.", "output": "Mars."}],
        "original_response": "Mars.",
        "chosen": [USER, GOOD],
        "rejected": [USER, BAD],
    },
    "ShareGPT": {
        "conversations": [{"from": "human", "value": "Name a planet."}],
        "chosen": {"from": "gpt", "value": "Mars."},
        "rejected": {"from": "gpt", "value": "No."},
    },
    "one message an answer": {"prompt": "Name a planet.", "chosen": GOOD, "rejected": BAD},
    "OpenAI": {
        "input": {"messages": [USER], "tools": [], "parallel_tool_calls": True},
        "preferred_output": [GOOD],
        "non_preferred_output": [BAD],
    },
    "Alpaca": {"instruction": "Name a planet.", "input": "", "chosen": "Mars.", "rejected": "No."},
    "Alpaca comparisons": {
        "instruction": "Name a planet.",
        "input": "",
        "output_1": "No.",
        "output_2": "Mars.",
        "preference": 2,
    },
    "HelpSteer2 preferences": {
        "prompt": "Name a planet.",
        "response_1": "Mars.",
        "response_2": "No.",
        "preference_strength": -2,
    },
    "HelpSteer3 preferences": {
        "context": [USER],
        "response1": "No.",
        "response2": "Mars.",
        "overall_preference": 1,
    },
    "SHP": {
        "history": "Name a planet.",
        "human_ref_A": "No.",
        "human_ref_B": "Mars.",
        "labels": 0,
        "score_A": 3,
        "score_B": 9,
    },
    "PKU-SafeRLHF": {
        "prompt": "Name a planet.",
        "response_0": "No.",
        "response_1": "Mars.",
        "better_response_id": 1,
    },
    "Chatbot Arena": {"conversation_a": [USER, BAD], "conversation_b": [USER, GOOD], "winner": "model_b"},
}
