"""The colours of the four places, which the interface and the figures share; no drawing here.

Blue, orange, green and pink of the colour-blind palette, which differ in lightness too.
"""

RUN_HEX = ("#0173b2", "#de8f05", "#029e73", "#cc78bc")
