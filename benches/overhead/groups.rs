//! Which contenders are measured in the same rounds, and which of them are compared.
//!
//! The names of contenders whose requests and responses are those of a chat API end in `-chat`; those of the others are
//! empty.

use crate::{
    contenders::{self, Contender},
    limiters,
    traffic::{Chat, Nothing},
};

/// Contenders that are measured in the same rounds, and the pairs of them that are compared.
pub(crate) struct Group {
    pub(crate) callers: &'static [usize],
    pub(crate) contenders: &'static [Contender],
    pub(crate) pairs: &'static [(&'static str, &'static str)],
}

pub(crate) const GROUPS: [Group; 6] = [
    Group {
        callers: &[1, 64, 512],
        contenders: &[
            contenders::executor::<Nothing>("executor"),
            contenders::executor_with_schedule::<Nothing>("executor-with-schedule"),
            contenders::executor_with_metrics::<Nothing>("executor-with-metrics"),
            contenders::executor_with_prometheus::<Nothing>("executor-with-prometheus"),
            contenders::stack_with_events::<Nothing>("stack-with-events"),
            contenders::stack_without_events::<Nothing>("stack-without-events"),
            contenders::tower_stack::<Nothing>("tower-stack"),
            contenders::resilience_stack::<Nothing>("tower-resilience-stack"),
        ],
        pairs: &[
            ("executor", "tower-stack"),
            ("executor-with-schedule", "executor"),
            ("executor-with-metrics", "executor"),
            ("executor-with-prometheus", "executor"),
            ("stack-with-events", "tower-stack"),
            ("stack-without-events", "tower-stack"),
            ("executor", "tower-resilience-stack"),
            ("stack-with-events", "tower-resilience-stack"),
            ("stack-without-events", "tower-resilience-stack"),
        ],
    },
    Group {
        callers: &[64],
        contenders: &[
            contenders::executor::<Chat>("executor-chat"),
            contenders::stack_with_events::<Chat>("stack-with-events-chat"),
            contenders::stack_without_events::<Chat>("stack-without-events-chat"),
            contenders::tower_stack::<Chat>("tower-stack-chat"),
            contenders::resilience_stack::<Chat>("tower-resilience-stack-chat"),
            contenders::bare::<Chat>("client-chat"),
            contenders::metered_executor::<Chat>("metered-executor-chat"),
            contenders::bare_collected::<Chat>("client-collected-chat"),
        ],
        pairs: &[
            ("executor-chat", "tower-stack-chat"),
            ("stack-with-events-chat", "tower-stack-chat"),
            ("stack-without-events-chat", "tower-stack-chat"),
            ("executor-chat", "tower-resilience-stack-chat"),
            ("executor-chat", "client-chat"),
            ("tower-stack-chat", "client-chat"),
            ("metered-executor-chat", "client-collected-chat"),
            ("metered-executor-chat", "tower-stack-chat"),
        ],
    },
    Group {
        callers: &[1, 64, 512],
        contenders: &[
            contenders::queue_layer::<Nothing>("queue"),
            contenders::tower_buffer::<Nothing>("tower-buffer"),
            contenders::concurrency_layer::<Nothing>("concurrency"),
            contenders::tower_concurrency::<Nothing>("tower-concurrency"),
            contenders::resilience_bulkhead::<Nothing>("tower-resilience-bulkhead"),
            contenders::rate_layer::<Nothing>("rate"),
            contenders::resilience_rate::<Nothing>("tower-resilience-rate"),
            contenders::event::<Nothing>("event"),
            contenders::tower_http_trace::<Nothing>("tower-http-trace"),
        ],
        pairs: &[
            ("queue", "tower-buffer"),
            ("concurrency", "tower-concurrency"),
            ("concurrency", "tower-resilience-bulkhead"),
            ("rate", "tower-resilience-rate"),
            ("event", "tower-http-trace"),
        ],
    },
    Group {
        callers: &[64],
        contenders: &[
            contenders::queue_layer::<Chat>("queue-chat"),
            contenders::tower_buffer::<Chat>("tower-buffer-chat"),
            contenders::concurrency_layer::<Chat>("concurrency-chat"),
            contenders::tower_concurrency::<Chat>("tower-concurrency-chat"),
            contenders::rate_layer::<Chat>("rate-chat"),
            contenders::resilience_rate::<Chat>("tower-resilience-rate-chat"),
            contenders::event::<Chat>("event-chat"),
            contenders::tower_http_trace::<Chat>("tower-http-trace-chat"),
        ],
        pairs: &[
            ("queue-chat", "tower-buffer-chat"),
            ("concurrency-chat", "tower-concurrency-chat"),
            ("rate-chat", "tower-resilience-rate-chat"),
            ("event-chat", "tower-http-trace-chat"),
        ],
    },
    // Tower's rate limit cannot be cloned, so this group has only one caller.
    Group {
        callers: &[1],
        contenders: &[
            contenders::rate_layer::<Nothing>("rate"),
            contenders::tower_rate::<Nothing>("tower-rate"),
        ],
        pairs: &[("rate", "tower-rate")],
    },
    Group {
        callers: &[1],
        contenders: &[
            limiters::TRY_ACQUIRE,
            limiters::GOVERNOR_CHECK,
            limiters::INSTANT_NOW,
            limiters::ACQUIRE,
            limiters::GOVERNOR_UNTIL_READY,
            limiters::LEAKY_BUCKET_ACQUIRE,
        ],
        pairs: &[
            ("try-acquire", "governor-check"),
            ("try-acquire", "tokio-instant-now"),
            ("acquire", "governor-until-ready"),
            ("acquire", "leaky-bucket-acquire"),
        ],
    },
];
