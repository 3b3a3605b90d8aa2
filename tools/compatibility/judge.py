"""Turn the facts of a cell into yes, or into what does not work."""

from tools.compatibility.rows import ROWS, SHARDED, Row

TOLERANCE = 1e-3  # of losses and gradient norms, relative to those of one process
LOGITS_TOLERANCE = 1e-4  # of the logits of the reloaded and of the merged model
LEAST_FALL = 0.01  # of the loss, from the first update to the last, relative
CHECKS = {  # the checks of a cell, in their order -> the words of the table if one fails
    "starts": "does not start",
    "optimizer": "different optimizer",
    "compiles": "not compiled",
    "learns": "does not train",
    "losses": "different losses",
    "shards": "not sharded",
    "reloads": "does not reload",
    "merges": "merges inexactly",
    "state": "state not saved",
}


def judge(cell, facts, reference):
    """Return check -> "" if it passes, or else why it does not.

    Checks that were not reached, or do not apply, are left out.

    Args:
        facts: what `measure.measure` returns.
        reference: facts of the same row in one process; None if that was not measured.
    """
    row, column = ROWS[cell.split("/")[0]], cell.split("/")[1]
    answers = judge_start(row, column, facts) if "bytes" in facts else {}
    if "losses" in facts:
        first, last = facts["losses"][0], facts["losses"][-1]
        falls = last < (1 - LEAST_FALL) * first
        answers["learns"] = "" if falls else f"the loss goes from {first:.4f} to {last:.4f}"
        if column != "single" and reference is not None and "losses" in reference:
            answers["losses"] = compare_curves(facts, reference)
    if "reload" in facts:
        answers["reloads"] = compare_reload(facts["reload"])
    if "merge" in facts:
        passes = facts["merge"] <= LOGITS_TOLERANCE
        answers["merges"] = "" if passes else f"merged logits differ by up to {facts['merge']:.2g}"
    if "state" in facts:
        answers["state"] = ""
    if "error" in facts:
        answers[facts["error"]["check"]] = facts["error"]["message"]
    return {check: answers[check] for check in CHECKS if check in answers}


def judge_start(row, column, facts):
    """Return the answers to the checks of a model that was prepared, but for the losses."""
    answers = {"starts": ""}
    if row.optimizer != Row.optimizer:
        wanted, used = row.optimizer.rpartition(".")[2], facts["optimizer"]
        answers["optimizer"] = "" if used == wanted else f"{wanted} was replaced by {used}"
    if "--dynamo_backend" in row.flags and "graphs" in facts:
        reason = "torch.compile was requested but compiled no graph"
        answers["compiles"] = "" if facts["graphs"] else reason
    if column in SHARDED:
        share = max(facts["bytes"]) / facts["whole"]
        passes = share <= 1.1 / len(facts["bytes"])
        answers["shards"] = "" if passes else f"a process holds {share:.0%} of the bytes"
    return answers


def compare_curves(facts, reference):
    """Return "" if losses and gradient norms are those of one process, else how they differ."""
    for key, name in (("losses", "loss"), ("grad_norms", "gradient norm")):
        differences = [
            abs(a - b) / max(abs(b), 1e-9) if a == a else float("inf")  # a != a: NaN
            for a, b in zip(facts[key], reference[key])
        ]
        if max(differences) > TOLERANCE:
            largest = f"{max(differences):.2g}"
            return f"{name} differs from that of one process by up to {largest}, relative"
    return ""


def compare_reload(found):
    """Return "" if the reloaded adapter is the trained one, else how they differ."""
    missing, unequal = found["missing"], found["unequal"]
    if missing:
        return f"the saved adapter lacks {len(missing)} trained tensors, such as {missing[0]}"
    if unequal:
        count = f"{len(unequal)} of {found['tensors']}"
        return f"{count} reloaded tensors differ, such as {unequal[0]}"
    if not found["logits"] <= LOGITS_TOLERANCE:
        return f"reloaded logits differ by up to {found['logits']:.2g}"
    return ""


def status(answers, facts):
    """Return the words of the table: "yes", what does not work, or that a setting was needed."""
    if not answers:
        return "not measured"
    words = ", ".join(CHECKS[check] for check, reason in answers.items() if reason) or "yes"
    return f"{words}, with a setting" if "without" in facts else words
