from sae_runner.report.style import COLOURS, colour_of


def test_twenty_kinds_have_twenty_colours():
    drawn = [colour_of(n) for n in range(20)]
    assert drawn[:7] == list(COLOURS) and len(set(drawn)) == 20
    assert all(len(colour) == 7 and int(colour[1:], 16) >= 0 for colour in drawn)
