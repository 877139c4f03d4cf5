//! Logs to stderr by `TOWLINE_LOG`, and spans to an OTLP collector when
//! `OTEL_EXPORTER_OTLP_ENDPOINT` names one. Otherwise no exporter exists and spans cost a branch.

use std::time::Duration;

use opentelemetry::trace::TracerProvider;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::SdkTracerProvider;
use tokio::runtime::Runtime;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

/// Which log lines to show: `debug`, `towline_link=trace,info` and the like.
pub const LOG_VARIABLE: &str = "TOWLINE_LOG";
const OTLP_VARIABLE: &str = "OTEL_EXPORTER_OTLP_ENDPOINT";

/// Bound on sending the last spans.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(2);

/// Holds the exporter; [`Telemetry::shutdown`] sends what is left.
#[derive(Debug)]
#[must_use = "spans that were not yet sent are lost without shutdown"]
pub struct Telemetry {
    exporter: Option<Exporter>,
}

/// The exporter has a thread and runtime of its own, so that it can still send when the process's
/// runtime has ended.
#[derive(Debug)]
struct Exporter {
    provider: SdkTracerProvider,
    runtime: Option<Runtime>,
}

impl Drop for Exporter {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background(); // may be dropped in async code
        }
    }
}

/// Starts logging and tracing of a server, showing `info` by default. Call it once.
pub fn init(service: &str) -> Telemetry {
    init_at(service, "info")
}

/// As [`init`], with another default; what a log filter cannot be read from is said and ignored.
pub fn init_at(service: &str, default: &str) -> Telemetry {
    let wanted = std::env::var(LOG_VARIABLE).unwrap_or_else(|_| default.into());
    let (filter, bad) = match EnvFilter::try_new(&wanted) {
        Ok(filter) => (filter, None),
        Err(error) => (EnvFilter::new(default), Some(error)),
    };
    let colour = std::env::var_os("NO_COLOR").is_none() && stderr_is_terminal();
    let stderr = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(colour)
        .with_filter(filter);
    let (exporter, failed) = match exporter(service) {
        Ok(exporter) => (exporter, None),
        Err(error) => (None, Some(error)),
    };
    // The exporter's own transport must not make spans, or each export would make the next.
    let spans = exporter.as_ref().map(|exporter| {
        tracing_opentelemetry::layer()
            .with_tracer(exporter.provider.tracer("towline"))
            .with_filter(EnvFilter::new("info,h2=off,hyper=off,tonic=off,tower=off"))
    });
    // A second call (in a test, say) keeps the first one's subscriber.
    let _ = tracing_subscriber::registry().with(stderr).with(spans).try_init();
    if let Some(error) = bad {
        tracing::warn!(%error, variable = LOG_VARIABLE, "log filter ignored");
    }
    if let Some(error) = failed {
        tracing::warn!(%error, variable = OTLP_VARIABLE, "spans are not exported");
    }
    Telemetry { exporter }
}

impl Telemetry {
    /// Sends the spans that are left, for at most two seconds. Blocks: call it last, outside async
    /// code or in `spawn_blocking`.
    pub fn shutdown(self) {
        if let Some(exporter) = &self.exporter
            && let Err(error) = exporter.provider.shutdown_with_timeout(FLUSH_TIMEOUT)
        {
            tracing::warn!(%error, "the last spans were not exported");
        }
    }
}

fn exporter(service: &str) -> Result<Option<Exporter>, Box<dyn std::error::Error>> {
    if std::env::var_os(OTLP_VARIABLE).is_none_or(|endpoint| endpoint.is_empty()) {
        return Ok(None);
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .thread_name("otlp")
        .enable_all()
        .build()?;
    let inside = runtime.enter();
    let exporter = opentelemetry_otlp::SpanExporter::builder().with_tonic().build()?;
    let resource = Resource::builder().with_service_name(service.to_owned()).build();
    let provider =
        SdkTracerProvider::builder().with_batch_exporter(exporter).with_resource(resource).build();
    drop(inside);
    Ok(Some(Exporter { provider, runtime: Some(runtime) }))
}

fn stderr_is_terminal() -> bool {
    use std::io::IsTerminal;
    std::io::stderr().is_terminal()
}
