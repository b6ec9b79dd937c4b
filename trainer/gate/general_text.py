"""A little general text of the project's own, to notice what an adapter makes its base forget. Data only.

Short passages on many subjects, so that no tenant's subject is most of it.
"""

from __future__ import annotations

PASSAGES = (
    "Water boils at a lower temperature on a mountain than at the sea, because the air presses on it less. Cooks "
    "who live high up let their beans simmer for longer.",
    "The train to the coast leaves every hour from platform four. If you miss the last one, a night bus takes the"
    " same road, though it stops in every village on the way.",
    "A bridge must carry its own weight before it can carry anything else. Engineers therefore spend much of "
    "their time making the middle of a long bridge light.",
    "She opened the window and listened. Somewhere behind the houses a dog barked twice, and then the street was "
    "as quiet as before.",
    "Most plants take in carbon dioxide through small openings in their leaves. By day the openings are wide; in "
    "a drought they close, and the plant grows more slowly.",
    "To change a tyre, loosen the nuts before you lift the car. Once the wheel is in the air it will turn with "
    "the wrench, and the nuts will not move.",
    "In the third year of the reign the harvest failed, and the price of bread doubled within a month. The "
    "council sent ships to the south to buy grain.",
    "The square root of two cannot be written as a fraction. Suppose it could, in lowest terms; then both numbers"
    " would have to be even, which they cannot be.",
    "My grandmother kept her recipes in a tin box, written on the backs of envelopes. None of them says how long "
    "anything takes, only what it should smell like when it is done.",
    "A good map leaves things out. If it showed every tree and every stone, it would be as large as the country "
    "and as hard to find your way in.",
    "The meeting was moved to Thursday because two of the members were ill. Please bring the figures for the "
    "second quarter and a list of open questions.",
    "Bees tell one another where flowers are by dancing. The angle of the dance gives the direction from the sun,"
    " and its length gives the distance.",
    "Sound travels faster through water than through air, and faster still through steel. That is why a rail hums"
    " long before the train can be heard.",
    "He had promised to be home by six. At half past seven he was still standing in the rain, explaining to a "
    "policeman how a goat had come to be in the back of his car.",
    "A computer stores a picture as a grid of numbers. Each number says how much red, green and blue there is at "
    "one point, and a million points make a sharp image.",
    "The river has moved its bed three times in four hundred years. Old boundary stones now stand in the middle "
    "of fields, far from any water.",
    "If a shop sells a coat for eighty and takes a quarter off the price, the coat costs sixty. Putting a quarter"
    " back on gives seventy-five, not eighty.",
    "Children learn the sounds of a language before they learn its words. At six months a baby can hear "
    "differences that its parents no longer notice.",
    "The moon always shows us the same side. It turns once on its axis in the time that it takes to go around the"
    " earth once.",
    "Wool keeps warm even when it is wet, because its fibres hold small pockets of air. Cotton gives up its air "
    "when it is soaked, and then it cools the skin.",
    "The orchestra tunes to the oboe. Its note is hard to bend, so everyone else has to come to it.",
    "Paper was once made of rags. When newspapers began to need more of it than there were rags, mills learned to"
    " boil wood instead.",
    "Before you paint a wall, wash it. Grease that cannot be seen will keep the paint from holding, and after a "
    "year it peels off in sheets.",
    "The youngest player won the match in forty moves. Afterwards she said that she had seen the idea in an old "
    "game and had waited two years to use it.",
    "Salt lowers the temperature at which water freezes. On very cold nights it no longer helps, and roads are "
    "covered with sand instead.",
    "A loan that is paid back in equal parts costs most at the beginning, because interest is owed on all that is"
    " still outstanding.",
    "The museum is closed on Mondays. On other days it opens at ten, and on the first Sunday of the month nobody pays.",
    "Some deserts are cold. What makes a desert is not heat but the lack of rain, and the driest place of all "
    "lies in the ice of the far south.",
    "When two programs write to the same file at once, one of them usually loses. A lock lets the second wait "
    "until the first has finished.",
    "The old sailor said that the wind would turn by evening. It did not, and they spent a second night off the "
    "island with nothing to eat but onions.",
    "Iron rusts because it joins with oxygen. A coat of zinc prevents this, since the zinc is used up first.",
    "Voting took place in the school hall. By noon more than half of the village had come, and the count was "
    "finished before dark.",
)
