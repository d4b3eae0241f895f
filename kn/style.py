"""The style sheets of the pages: TABLE_STYLE goes into notebooks too, PAGE_STYLE is of whole pages."""

TABLE_STYLE = """
.kn{color-scheme:light dark;--page:#fbfaf7;--ink:#22262b;--soft:#656c75;--line:#dedbd3;--rule:#22262b;--link:#0b5c8a;--banner:#fff3d6;--edge:#d9a520;
--held:#1e6b3a;--failed:#a52a2a;--open:#7a5b00;--mark:#e8f1f7;--sans:system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;
background:var(--page);color:var(--ink)}
@media(prefers-color-scheme:dark){.kn{--page:#15181b;--ink:#e4e1da;--soft:#9aa1a9;--line:#33383e;--rule:#b9b6af;--link:#7cb9e0;--banner:#3a2f12;--edge:#b58a1c;
--held:#7ccb97;--failed:#ef8f8f;--open:#e3bd5b;--mark:#1f2a33}}
.kn .scroll{overflow-x:auto;margin:.8rem 0;border-top:2px solid var(--rule);border-bottom:2px solid var(--rule);font:.84rem/1.5 var(--sans)}
.kn table{border-collapse:collapse;font-variant-numeric:tabular-nums;min-width:100%;margin:0;border:0}
.kn th,.kn td{padding:.45rem .45rem;text-align:right;vertical-align:top;white-space:nowrap;border:0;font-size:inherit}
.kn thead th.key{min-width:0!important}
.kn thead th{white-space:normal;min-width:4.6rem;max-width:10rem;border-bottom:1px solid var(--rule);font-weight:600;vertical-align:bottom}
.kn tbody tr+tr>*{border-top:1px solid var(--line)}
.kn table.wide{font-size:.93em}.kn .named th:first-child{min-width:13rem;max-width:20rem}
.kn tbody tr:nth-child(n){background:none}.kn th:first-child{position:sticky;left:0;z-index:1;background:var(--page);text-align:left;font-weight:600;
white-space:normal;hyphens:auto;min-width:7.6rem;max-width:13rem}.kn td>span,.kn td>a{display:block}.kn .key,.kn .paper,.kn .delta{color:var(--soft)}
.kn td.key{font-size:.92em;line-height:1.63;text-align:left;padding-left:.2rem;padding-right:0}.kn .ours{font-weight:600;color:var(--ink);text-decoration:none}
.kn a.ours{text-decoration:underline;text-decoration-color:var(--line);text-underline-offset:.2em}.kn a.ours:hover{text-decoration-color:currentColor}
.kn .ours small{font-weight:400;font-size:.85em;color:var(--soft)}.kn .tag{font-size:.9em;font-style:italic;color:var(--soft);font-weight:400}
.kn td.text{white-space:normal;min-width:7rem;max-width:18rem}.kn td.claim{text-align:left;white-space:normal;min-width:10.5rem;max-width:34rem}
.kn .faint .ours{font-weight:400;color:var(--soft)}.kn .held{color:var(--held);font-weight:600}.kn .not-held{color:var(--failed);font-weight:600}
.kn .unseen{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%);white-space:nowrap}
.kn .verdict{white-space:nowrap;font-weight:600;color:var(--soft)}.kn .verdict.good{color:var(--held)}.kn .verdict.bad{color:var(--failed)}.kn .verdict.open{color:var(--open)}
.kn .note,.kn q{display:block;font-weight:400;color:var(--soft);font-size:.92em;margin-top:.15rem}.kn q{font-style:italic}.kn code{font-size:.95em;overflow-wrap:anywhere}
.kn .ledger th[scope=row]{min-width:17rem;max-width:34rem}.kn .ledger td{text-align:left}
.kn .verdicts td.chips{text-align:left;white-space:normal;line-height:2}.kn .verdicts thead th,.kn .ledger thead th{text-align:left;max-width:none}.kn .verdicts th:first-child{min-width:5rem;max-width:8rem}
.kn .chip{text-decoration:none;border:1px solid var(--line);border-radius:.3rem;padding:.05rem .35rem;margin:0 .1rem .2rem 0;display:inline-block;line-height:1.45}.kn .chip:hover{border-color:currentColor}
"""
PAGE_STYLE = """
*{box-sizing:border-box}html{-webkit-text-size-adjust:100%;scroll-padding-top:3.5rem}
body{margin:0;font:17px/1.55 Charter,"Iowan Old Style",Palatino,Georgia,"DejaVu Serif",serif}
main,nav>div{max-width:76rem;margin:0 auto;padding:0 1.25rem}main{padding-bottom:4rem}
h1{font-size:1.9rem;line-height:1.2;margin:2rem 0 .3rem;font-weight:600}h2{font-size:1.35rem;line-height:1.3;margin:3.2rem 0 .4rem;font-weight:600}
h3{font-size:1.05rem;margin:2rem 0 .3rem}p{max-width:44rem;margin:.4rem 0 .9rem}a{color:var(--link)}
.soft,figcaption{font:.84rem/1.5 var(--sans);color:var(--soft)}
.banner{background:var(--banner);border-bottom:2px solid var(--edge);text-align:center;padding:.5rem 1rem;font:600 .9rem/1.4 var(--sans)}
nav{position:sticky;top:0;z-index:3;background:var(--page);border-bottom:1px solid var(--line);font:.86rem/1.5 var(--sans)}
nav>div{display:flex;gap:1.1rem;overflow-x:auto;padding-top:.55rem;padding-bottom:.55rem;white-space:nowrap}nav a{text-decoration:none}
figure{margin:1.2rem 0 0}figure>div{overflow-x:auto}figure svg{display:block;width:100%;min-width:34rem;max-width:52rem;height:auto}
.kn .record table{min-width:0}.kn .record th:first-child{min-width:9rem}
.record td{text-align:left!important;white-space:normal!important;overflow-wrap:anywhere;min-width:6rem;max-width:34rem}
.record tbody th{max-width:none!important;overflow-wrap:anywhere;font-weight:400!important;color:var(--soft)}
:target{background:var(--mark)}@media(max-width:600px){body{font-size:16px}.kn th,.kn td{padding:.4rem .5rem}
.kn th:first-child,.kn .named th:first-child{min-width:5.2rem;max-width:6.2rem}h1{font-size:1.5rem}main,nav>div{padding-left:.9rem;padding-right:.9rem}}
.skip{position:absolute;left:-99rem}.skip:focus{left:.5rem;top:.5rem;z-index:9;background:var(--page);padding:.4rem .8rem;border:2px solid var(--link)}
a:focus-visible,.scroll:focus-visible,summary:focus-visible,figure>div:focus-visible{outline:2px solid var(--link);outline-offset:2px}
nav a[aria-current]{color:var(--ink);font-weight:600}pre{overflow-x:auto;border:1px solid var(--line);padding:.7rem 1rem;font-size:.82rem;line-height:1.5;max-width:52rem}
.record pre{margin:.3rem 0 0;padding:.4rem .6rem;font-size:.75rem;white-space:pre}summary{cursor:pointer}li{max-width:56rem;margin:.35rem 0}li,p{overflow-wrap:break-word}
ul.cards{list-style:none;padding:0;display:flex;flex-wrap:wrap;gap:1rem}ul.cards li{border:1px solid var(--line);border-top:2px solid var(--rule);padding:.6rem 1rem;font:.9rem/1.5 var(--sans);margin:0}
ul.cards span{display:block;color:var(--soft)}ul.cards b{font-size:1.15rem}
@media(max-width:700px){.kn .ledger thead{position:absolute;clip-path:inset(50%);height:1px;overflow:hidden}.kn .ledger table,.kn .ledger tbody,.kn .ledger tr,.kn .ledger td,.kn .ledger th{display:block;max-width:none}
.kn .ledger th[scope=row]{position:static;min-width:0;max-width:none}.kn .ledger tbody tr{padding:.6rem 0}.kn .ledger tbody tr+tr{border-top:1px solid var(--line)}.kn .ledger tbody tr+tr>*{border:0}
.kn .ledger td{white-space:normal;padding-top:.1rem;padding-bottom:.1rem}.kn .ledger td[data-label]::before{content:attr(data-label) ": ";color:var(--soft)}}
@media print{.kn{--page:#fff;--ink:#000;--soft:#444;--line:#bbb;--link:#000;--held:#1e6b3a;--failed:#8a1f1f;--open:#6b5200}nav,.skip,details:not([open]){display:none}
.kn .scroll,figure>div{overflow:visible}.kn .scroll{font-size:.62rem}.kn th:first-child{position:static;min-width:0!important}.kn th,.kn td{padding:.15rem .25rem!important;white-space:normal!important;min-width:0!important}
figure,tr,h2,h3{break-inside:avoid}h2,h3{break-after:avoid}figure svg{min-width:0}body{font-size:11pt}}
"""
