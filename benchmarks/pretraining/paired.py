"""Losses compared with a baseline's, seed by seed, in percent."""


def percent_above(results, baseline):
    """{seed: percent}, of the seeds that both have and that did not diverge."""
    pairs = {
        seed: (result["validation_loss"], baseline[seed]["validation_loss"])
        for seed, result in results.items()
        if seed in baseline
    }
    return {
        seed: 100 * (ours / theirs - 1)
        for seed, (ours, theirs) in pairs.items()
        if None not in (ours, theirs)
    }


def over_texts(model, finals, method, baseline):
    """Percent, one for each seed: the mean over texts, which share a seed's initial weights."""
    of_texts = [
        percent_above(results, finals.get((model, text, baseline), {}))
        for (m, text, name), results in finals.items()
        if (m, name) == (model, method)
    ]
    seeds = set.intersection(*map(set, of_texts)) if of_texts else ()
    return [sum(of[seed] for of in of_texts) / len(of_texts) for seed in sorted(seeds)]
