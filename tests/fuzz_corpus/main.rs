//! Runs the fuzz targets of the library (see `fuzz/`) over their seeds and over random texts, without a fuzzer and on a
//! stable compiler.

mod inputs;
#[path = "../secrets/recorded.rs"]
mod recorded;
mod targets;

use inputs::{over_random_texts, over_the_seeds};
use std::path::Path;

macro_rules! targets {
    ($($target:ident: $words:expr;)*) => {$(
        #[test]
        fn $target() {
            let seeds = concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz/corpus/", stringify!($target));
            over_the_seeds(Path::new(seeds), targets::$target);
            over_random_texts(targets::$target, $words);
        }
    )*};
}

targets! {
    response_body: r#"{"usage":{"total_tokens": "prompt_tokens": 9 -1 1.5 null}} "message": "response": "usageMetadata": "error":{"code":"insufficient_quota" "details":[ "retryDelay":"1.5s" "violations": "quotaId":"PerDay" limit: 0 data: event: : \n \r\n messages content max_tokens [ ] { } , " :"#;
    budget: "requests tokens input_tokens output_tokens images seconds cents.usd A _ - . é";
    limiter: "A B C D E F G H I J K a b c d e f g h 0 1 2 3 4 5 6 7 8 9";
    config: r#"{"queue_capacity": "workers": "budgets": {"images": [{"rate": "period_secs": "burst": "input_tokens": "output_tokens": ] "requests_rate": "requests_period_secs": "requests_burst": "tokens_rate": "tokens_period_secs": "tokens_burst": 1e308 1e-6 0.5 18446744073709551615 null -1 , }"#;
    feedback: r#"H I J K L M N O P Q R S T U V W X Y Z a b c d e 1 60 -1 1.5 2m59.56s 12ms 99999999999999999999 2026-02-25T20:02:32Z Wed, 21 Oct 2026 07:28:00 GMT "a" ;q=100 ;w=60 ;r=5 ;t=1 ;qu="tokens" limit=10 remaining=9 reset=1 , ; = ( ) : ?"#;
    status: "PENDING QUEUED PROCESSING CALLING COMPLETED FAILED CANCELLED pending";
    text: r#"Bearer Basic token= api_key " ' \ [ ] { } ( ) : , ; // http://u:p@h/ ? # & % [redacted] Some( "sig":" \" ` <"#;
    url: "http:// https:// u:p@ h.example / // ? & = ; # @ % %25 %3D %26 token sig key= api_key= next= [redacted] \\";
    value: r#"{"token": {"a": " http://u:p@h/ [redacted] Bearer 1 -1 1e9 null true " [ ] { } , : \"#;
}
