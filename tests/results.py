"""Results of an imagined run, for tests of what is done with results."""

from curlora.continual.results import MethodResult, RunResults, TaskInfo


def make_results(**changes):
    tasks = [
        TaskInfo(
            name=name,
            description=f"about {name}",
            labels=["a", "b"],
            train_examples=400,
            evaluation_examples=200,
            majority_rate=0.5,
        )
        for name in ("reviews", "reuters", "tweets")
    ]

    def method(name, label, accuracy, perplexity, trained, size):
        return MethodResult(
            name=name,
            label=label,
            learning_rate=1e-3,
            trainable_parameters=trained,
            adapter_bytes=size,
            accuracy=accuracy,
            perplexity=perplexity,
            losses=[(5, 1.2), (10, 0.8), (15, 0.5)],
            train_tokens=10_000,
            train_seconds=30.0,
            seconds=40.0,
        )

    methods = [
        method("frozen", "Frozen <heads>", [[0.74], [0.74, 0.77], [0.74, 0.77, 0.89]], [20.2] * 4, 0, 0),
        method(
            "lora",
            "LoRA",
            [[0.825], [0.815, 0.79], [0.79, 0.805, 0.88]],
            [20.2, 20.6, 21.3, 21.4],
            1_290_240,
            5_180_000,
        ),
        method(
            "curlora", "CURLoRA", [[0.77], [0.77, 0.8], [0.76, 0.79, 0.89]], [20.2, 20.4, 20.5, 20.6], 23_040, 140_900
        ),
    ]
    fields = dict(
        title="Three tasks, one after another",
        created="2026-01-01 00:00",
        base_model="SmolLM2-135M-Instruct",
        base_parameters=134_515_008,
        heldout="a text",
        seed=0,
        settings={"epochs": 1, "batch_size": 8},
        environment={"torch": "2"},
        tasks=tasks,
        methods=methods,
    )
    return RunResults(**{**fields, **changes})
