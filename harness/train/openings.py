"""How the target's own user turns may begin, so that what it writes to learn from covers what people ask for.

A model left alone with its chat template writes mostly small talk. Half of the dialogues therefore start with a few
words of a request, and the model goes on from there: it invents the topic, the passage, the code. `{a|b}` in a pattern
stands for either.
"""

from __future__ import annotations

import itertools
import re

PATTERNS = (
    # writing
    "Write a {short|formal|friendly|funny} {email|letter|note} to my {boss|landlord|neighbour|teacher|customer} about",
    "Write a {short story|poem|blog post|speech|product description|review|news article} about",
    "Write {the first paragraph of a novel|a dialogue between two people} in which",
    "Describe {a place where|a person who|the moment when|a market in}",
    # roleplay
    "You are {a doctor|a chef|a sailor|a robot|a teacher|a knight|a travel guide}. ",
    "{Pretend to be|Imagine that you are|Act as} {an old|a famous|a friendly|a grumpy}",
    # reasoning and mathematics
    "{A farmer|Anna|My brother|A train} {has|leaves|wants to|is}",
    "{If all|If some|Suppose that}",
    "{Solve the equation|Calculate the|What is the sum of|Find the area of a}",
    "A {shop|train|tank|rectangle|car|school} {has|costs|is} {12|25|40|300}",
    "{Why is it that|What would happen if|Which is better,|What is wrong with the argument that}",
    # coding
    "Write a {Python|JavaScript|Java|C++|Rust} {function|program|class} {that|to|which}",
    "Write {an SQL query|a shell script|a regular expression|a unit test|an HTML page} {that|for}",
    "{How do I|What is the best way to} {sort|read|parse|convert|test} {a|an} ",
    "Explain {what this code does|the difference between}",
    # extraction
    "Extract {all names|the dates|the prices|the key facts} from {this text|the following message}: \"",
    "{List|Find} the {people|places|numbers|tasks} in this {email|paragraph|report}.\n\n",
    "Classify {this review|each of these sentences} as {positive or negative|fact or opinion}: \"",
    "Turn {this text|these notes} into {a table|a JSON object|a bulleted list}.\n\n",
    # knowledge
    "Explain {how|why} {a|the|plants|animals|computers|stars|people|some metals}",
    "{What is|What are|How does|How do|Why do|Why are} ",
    "Compare {the|two} ",
    "Describe the {causes of|history of|role of|structure of|life of}",
    "{Give me|List} {three|five|ten} {reasons|examples|tips|ideas|ways} ",
    # summaries and passages
    "{Summarize|Shorten} {the following text|this article|the story below} in {one sentence|three sentences|50 words}."
    "\n\n{The|In|A|On|When}",
    "{Answer the question using the passage|Read the passage and answer the question}.\n\nPassage: {The|In|A}",
    "Use only the {text|information} below to answer. {Text:|Information:} {The|Our|A}",
    # translation and correction
    "Translate {this|the following} {sentence|text|message} into {French|Spanish|German|Italian|Portuguese}: \"",
    "Translate from {French|Spanish|German} into English: \"",
    "{Correct the grammar in|Rewrite|Make more polite} this {sentence|paragraph|email}: \"",
    # code editing
    "{Fix the bug in|Simplify|Add comments to|Add error handling to} {this Python function|the code below}."
    "\n\n```python\ndef ",
    "{Rewrite|Refactor|Improve} this {JavaScript|Java|C} code.\n\n```\n",
)  # fmt: skip


def openings() -> list[str]:
    """Every pattern written out, the patterns taking turns so that any stretch of the list has all kinds."""
    turns = itertools.zip_longest(*(_spread(pattern) for pattern in PATTERNS))
    return [opening for turn in turns for opening in turn if opening is not None]


def _spread(pattern: str) -> list[str]:
    pieces = re.split(r"\{(.*?)\}", pattern)
    choices = [piece.split("|") if place % 2 else [piece] for place, piece in enumerate(pieces)]
    # The space before the next word belongs to that word's token.
    return ["".join(chosen).rstrip(" ") for chosen in itertools.product(*choices)]
