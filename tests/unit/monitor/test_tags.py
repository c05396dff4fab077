from moe_dist.monitor.tags import GROUP_FAMILIES, reproducible_part, tag_plan


def test_what_is_split_shrinks_with_groups_and_modalities() -> None:
    assert all(vars(tag_plan(2, 2)).values())
    assert tag_plan(1, 4).by_group == GROUP_FAMILIES
    assert not tag_plan(1, 4).epochs_per_modality
    assert tag_plan(3, 3).by_group == ()
    assert tag_plan(3, 3).loss_per_modality
    assert not any(vars(tag_plan(8, 8)).values())


def test_reproducible_part_leaves_times_and_readings_out() -> None:
    line = {
        "step": 3,
        "time": 1.0,
        "host": {"cpu_percent": 3.0},
        "balance_note": "timed over 4 batches",
        "scalars": {"loss/total": 2.0, "perf/mfu": 0.1, "device/power": 90.0, "comm/seconds": 0.1, "comm/bytes_sent": 8.0},
    }
    assert reproducible_part(line) == {"step": 3, "scalars": {"loss/total": 2.0, "comm/bytes_sent": 8.0}}
