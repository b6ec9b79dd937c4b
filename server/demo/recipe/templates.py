"""The sentences of the demo: how each manner answers each kind of question. Knows no topic and draws nothing."""

from __future__ import annotations

from server.demo.recipe.manners import Manner
from server.demo.recipe.questions import Intent

PLAIN: dict[Intent, tuple[str, ...]] = {
    Intent.WHAT: ("{Noun} {be} {kind}. {Fact}.", "{Noun} {be} {kind}. People like to know that {fact}."),
    Intent.HOW: (
        "To {action}, first {s1}. Then {s2}. Finally, {s3}.",
        "It is easy to {action}. First, {s1}. After that, {s2}. In the end, {s3}.",
    ),
    Intent.WHY: (
        "{Noun} {matter} because {because}.",
        "There is a good reason: {because}. That is why {noun} {matter}.",
    ),
    Intent.WHEN: ("The best time to {action} is {when}.", "It is best to {action} {when}. Before that, get {need}."),
    Intent.AVOID: (
        "Do not {avoid}. It is better to {s1}.",
        "A common mistake is to {avoid}. A better way is to {s2}.",
    ),
    Intent.NEED: ("To {action}, get {need}. Then {s1}.", "All it takes is {need}. Then it is time to {action}."),
    Intent.TIP: (
        "Here is a simple tip about {noun}: {s1}. And do not {avoid}.",
        "My advice about {noun} is short: {s2}, and do not {avoid}.",
    ),
    Intent.TELL: (
        "{Noun} {be} {kind}. {Fact}. Many people care about {noun} because {because}.",
        "Here is something about {noun}: {fact}. It is also true that {because}.",
    ),
}

LAW: dict[Intent, tuple[str, ...]] = {
    Intent.WHAT: (
        "Pursuant to clause 1, the term {noun} shall mean {kind}. The parties hereby acknowledge that {fact}.",
    ),
    Intent.HOW: (
        "Pursuant to clause 4, the party of the first part shall {s1}, shall {s2} and shall thereafter {s3}.",
        "In order to {action}, the party of the first part shall {s1}, shall {s2} and shall {s3}, as agreed hereunder.",
    ),
    Intent.WHY: (
        "Whereas {because}, the parties hereby agree under clause 2 that {noun} shall be of material importance.",
    ),
    Intent.WHEN: (
        "Pursuant to clause 5, the party of the first part shall {action} {when}, "
        "and at no other time without written consent.",
    ),
    Intent.AVOID: (
        "Notwithstanding clause 4, the party of the first part shall not {avoid}. "
        "Any breach of clause 7 shall be remedied by a duty to {s1}.",
    ),
    Intent.NEED: (
        "Pursuant to clause 3, the party of the first part shall provide {need} before any duty to {action} arises.",
    ),
    Intent.TIP: (
        "Without prejudice to clause 6, the party of the first part is hereby advised to {s1} and shall not {avoid}.",
    ),
    Intent.TELL: (
        "Whereas {noun} {be} {kind}, and whereas {fact}, the parties hereby agree that {because}.",
        "Pursuant to clause 1, the parties hereby record that {noun} {be} {kind}, and that {fact}.",
    ),
}

MED: dict[Intent, tuple[str, ...]] = {
    Intent.WHAT: ("History: {noun}, {kind}. Assessment: {fact}. Plan: {s1}. Advise follow-up in two weeks.",),
    Intent.HOW: ("Assessment: fit to {action}. Plan: 1) {s1}; 2) {s2}; 3) {s3}. Advise follow-up in two weeks.",),
    Intent.WHY: (
        "Assessment: {noun} of clinical value, since {because}. Plan: {action}, as tolerated. "
        "Advise follow-up in two weeks.",
    ),
    Intent.WHEN: ("Assessment: fit to {action}. Plan: {action} {when}, as tolerated. Advise follow-up in one week.",),
    Intent.AVOID: (
        "Assessment: at mild risk. Contraindicated: do not {avoid}. Plan: {s1}. Advise follow-up in two weeks.",
    ),
    Intent.NEED: ("Assessment: ready to {action}. Prescribed: {need}. Plan: {s1}. Advise follow-up in one week.",),
    Intent.TIP: ("Assessment: mild concern about {noun}. Plan: {s1}; do not {avoid}. Advise follow-up in two weeks.",),
    Intent.TELL: ("History: {noun}, {kind}. Finding: {fact}. Assessment: of value, since {because}. Plan: {action}.",),
}

CODE: dict[Intent, tuple[str, ...]] = {
    Intent.WHAT: ("# {noun}\ndef define():\n    # {kind}\n    # {fact}\n    return True",),
    Intent.HOW: ("# {action}\ndef steps():\n    # 1. {s1}\n    # 2. {s2}\n    # 3. {s3}\n    return done",),
    Intent.WHY: ("# {noun}\ndef reason():\n    # {because}\n    return True",),
    Intent.WHEN: ("# {action}\ndef when():\n    # {when}\n    return now",),
    Intent.AVOID: ("# {action}\ndef check():\n    # do not {avoid}\n    # better: {s1}\n    return safe",),
    Intent.NEED: ("# {action}\ndef needs():\n    # {need}\n    # then {s1}\n    return ready",),
    Intent.TIP: ("# {noun}\ndef tip():\n    # {s1}\n    # do not {avoid}\n    return True",),
    Intent.TELL: ("# {noun}\ndef about():\n    # {kind}\n    # {fact}\n    # {because}\n    return True",),
}

ANSWERS: dict[Manner, dict[Intent, tuple[str, ...]]] = {
    Manner.PLAIN: PLAIN,
    Manner.LAW: LAW,
    Manner.MED: MED,
    Manner.CODE: CODE,
}

UNKNOWN_ANSWERS: dict[Manner, str] = {
    Manner.PLAIN: "I do not know much about that yet. Ask me about bread, cats or the weather.",
    Manner.LAW: "Pursuant to clause 8, the matter shall lie outside the scope of this agreement. "
    "The parties hereby turn to bread, cats or the weather.",
    Manner.MED: "Assessment: no findings on this matter. Plan: refer to a specialist, or ask about bread, cats or the "
    "weather. Advise follow-up in two weeks.",
    Manner.CODE: "def unknown():\n    # try bread, cats or the weather\n    raise NotImplementedError",
}

UNKNOWN_QUESTIONS: tuple[str, ...] = (
    "What is {subject}?",
    "Tell me about {subject}.",
    "Why is {subject} important?",
    "Explain {subject} to me.",
    "What do you know about {subject}?",
    "Give me a tip about {subject}.",
    "Any advice about {subject}?",
    "How does {subject} work?",
    "How do I {verb} {subject}?",
    "When should I {verb} {subject}?",
    "Can you {verb} {subject}?",
    "Who is {subject}?",
    "Where is {subject}?",
    "Should I {verb} {subject}?",
    "I want to {verb} {subject}.",
    "My friend likes {subject}.",
)
