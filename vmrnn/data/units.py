"""Units, as files of one kind and of another write them."""

import re
from collections import Counter

# Words that CF files use for one unit, beside its symbol
SYMBOLS = {"hr": "h", "hour": "h", "hours": "h", "sec": "s", "second": "s", "seconds": "s", "kelvin": "K"}
FACTOR = re.compile(r"([a-zA-Z%°µ]+)(-?[0-9]+)?")


def same_unit(unit, other):
    """Whether two texts are one unit: m/s, m s-1, m.s^-1 and m s**-1 are.

    Nothing is converted, and no other words are known than SYMBOLS: mm and m are two units, and so are C and degC.
    """
    if unit == other:
        return True
    powers = powers_of(unit)
    return bool(powers) and powers == powers_of(other)


def powers_of(unit):
    """{symbol: exponent} of a unit, such as {"kg": 1, "m": -2}; {}: it is not written as a product of powers."""
    powers, divided = Counter(), False
    for part in re.findall(r"/|[^\s/*.·]+", unit.replace("**", "").replace("^", "")):
        if part == "/":
            divided = True
            continue
        factor = FACTOR.fullmatch(part)
        if not factor:
            return {}
        exponent = int(factor[2] or 1)
        powers[SYMBOLS.get(factor[1], factor[1])] += -exponent if divided else exponent
        divided = False  # a slash divides by the next factor alone, as in udunits
    return dict(powers)
