"""What there is to say of an event of islands, in one line."""

from typing import Any

from qlora_dist.coordinate.ranges import count

Line = tuple[str, str, str]  # label, text, style


def unit_of(record: dict[str, Any]) -> str:
    """What a record's `step` counts: a coordinator of islands has no attempts, and commits rounds."""
    return "round" if record.get("attempt") == 0 else "step"


def island_line(event: dict[str, Any]) -> Line | None:
    """The line of an event that a person wants to know of; None for any other."""
    match event["kind"]:
        case "islands_begun":
            return "islands", f"{event['packs']:,} packs, {event['parameters']:,} parameters exchanged", ""
        case "island_joined":
            return "island", f"{event['island']} has joined", ""
        case "island_left":
            return "island", f"{event['island']} has left: {event['reason']}", ""
        case "contribution_refused":
            return "refused", f"lease {event['lease']}: {event['reason']}", "yellow"
        case "process_ended":
            return "failed", event["message"], "yellow"
        case "round_committed":
            return "round", round_text(event), ""
        case "rounds_closed":
            return "islands", f"no more rounds ({event['reason']}); {count(event['dropped']):,} packs dropped", "yellow"
    return None


def round_text(event: dict[str, Any]) -> str:
    """A committed round, the first being 1: who, how much, the loss."""
    metrics = event["facts"].get("metrics", {})
    islands = ", ".join(entry["island"] for entry in event["counted"])
    parts = [f"{event['round'] + 1}: {len(event['counted'])} contribution(s) ({islands}), closed by {event['why']}"]
    if metrics.get("loss") is not None:
        parts.append(f"loss {metrics['loss']:.4f}")
    if metrics.get("bytes_sent"):
        parts.append(f"{(metrics['bytes_sent'] + metrics['bytes_received']) / 1e6:.2f} MB exchanged")
    if event["missed"]:
        parts.append(f"without {', '.join(event['missed'])}")
    return "; ".join(parts)
