//! smoke
use std::sync::Arc;
use tensorferry::*;
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;
#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_env_filter(tracing_subscriber::EnvFilter::from_default_env()).init();
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args[0].as_str() {
        "serve" => {
            let s = Server::builder(&args[1]).bind(args[2].parse()?).await?;
            println!("{{\"event\":\"listening\",\"address\":\"{}\"}}", s.local_addr());
            s.serve(std::future::pending()).await?;
        }
        "push" => {
            let src = Arc::new(source::SourceSet::open(&[args[1].clone().into()], &Default::default())?);
            let mut o = PushOptions::default();
            o.overwrite = args.len() > 4;
            let c = Client::new(&args[2])?;
            let r = c.push(src, &args[3].parse()?, o).await?;
            println!("{r:?}");
        }
        _ => {}
    }
    Ok(())
}
